"""LlamaIndex: a language model and a Chroma vector store that reuse the KV caches of retrieved chunks.

Begin reading with `llm.py`: `predict.py` keeps the question apart, `prompts.py` and `messages.py` make of LlamaIndex's
prompts what the engine takes, `engine_calls.py` calls it. `vector_store.py` is index time with Chroma, `kv_caches.py`
with any vector store.
"""

from prophetkv_rag.extras import needs

with needs(
    "llama-index", "llama_index.core", "llama_index.vector_stores.chroma", what="prophetkv_rag.integrations.llama_index"
):
    from prophetkv_rag.integrations.llama_index.altered import AlteredTextCache
    from prophetkv_rag.integrations.llama_index.embedding import MiniLMEmbedding
    from prophetkv_rag.integrations.llama_index.events import ReuseReportEvent
    from prophetkv_rag.integrations.llama_index.kv_caches import with_kv_caches
    from prophetkv_rag.integrations.llama_index.llm import ProphetKVLLM
    from prophetkv_rag.integrations.llama_index.refusal import CallRefusedError
    from prophetkv_rag.integrations.llama_index.settings import configure
    from prophetkv_rag.integrations.llama_index.synthesizer import ProphetKVSynthesizer
    from prophetkv_rag.integrations.llama_index.templates import prompt_template_of
    from prophetkv_rag.integrations.llama_index.vector_store import ProphetKVChromaVectorStore

__all__ = [
    "AlteredTextCache",
    "CallRefusedError",
    "MiniLMEmbedding",
    "ProphetKVChromaVectorStore",
    "ProphetKVLLM",
    "ProphetKVSynthesizer",
    "ReuseReportEvent",
    "configure",
    "prompt_template_of",
    "with_kv_caches",
]
