"""No framework: cache chunks once, fill a KV cache from them, and let transformers generate."""

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.defaults import fetch_default_model

chunks = [
    "The lighthouse on the island was built in 1862 and still guides ships into the harbour.",
    "The old library stands beside the river; its reading room holds forty thousand books.",
]
engine = ProphetKVEngine.from_pretrained(fetch_default_model(), config=ProphetKVConfig(recompute_ratio=0.2))
engine.add_chunks(chunks)  # once; give the engine a store on disk to keep them

# Any order, any subset, behind any prefix. A chat model wants its own template around it all.
template = engine.tokenizer.apply_chat_template(
    [{"role": "user", "content": "CHUNKS\n\nHow many books does the library hold?"}],
    tokenize=False,
    add_generation_prompt=True,
)
prefix, suffix = template.split("CHUNKS")
result = engine.prefill(Prompt(prefix, chunks[::-1], suffix, glue="\n\n"))

with engine.model_lock:  # needed only while other threads use the engine
    output = engine.model.generate(**result.inputs, max_new_tokens=40, do_sample=False)
print(engine.tokenizer.decode(output[0, result.input_ids.shape[1] :], skip_special_tokens=True))
print(result.report)
