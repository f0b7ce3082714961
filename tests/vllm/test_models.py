"""Other models and settings of vLLM, on tiny random models: each answers as our engine does on the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.tiny import save_tiny, text_of, tiny_llama, tiny_tokenizer
from tests.vllm.quantized import quantize
from tests.vllm.serving import Served, reuse, tokens

SHAPE = {
    "vocab_size": 480,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}


def random_model(kind, config, **overrides):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config(**(SHAPE | overrides))).float().eval()


MODELS = {
    "llama": lambda: tiny_llama(**SHAPE),
    "llama3-rope": lambda: tiny_llama(
        **SHAPE
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        }
    ),
    "qwen3": lambda: random_model(Qwen3ForCausalLM, Qwen3Config),
    "mistral-window": lambda: random_model(MistralForCausalLM, MistralConfig, sliding_window=96),
}


@pytest.fixture
def serve(tmp_path):
    """Serves a tiny model; closed at the end."""
    opened = []

    def start(kind="llama", **settings):
        directory = tmp_path / kind
        if not directory.exists():
            MODELS[kind]().save_pretrained(directory)
            tiny_tokenizer().save_pretrained(directory)
        served = Served(directory, tmp_path / "caches", **({"block_size": 32} | settings))
        opened.append(served)
        return served

    yield start
    for served in opened:
        served.close()


def prompts_of(served, count=2, chunks=4):
    """Register chunks, and make prompts that have them in changing order."""
    texts = [text_of(70, seed=seed) for seed in range(chunks)]
    served.register(texts)
    asked = []
    for number in range(count):
        order = texts[number % chunks :] + texts[: number % chunks]
        text = "Read this.\n\n" + "\n\n".join(order) + f"\n\n{text_of(8, seed=100 + number)}"
        asked.append([{"role": "user", "content": text}])
    return asked


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_answers_as_our_engine(serve, kind):
    served = serve(kind)
    prompts = prompts_of(served)
    for ratio in (0.0, 0.25):
        served.forget_prefixes()
        with served.selections() as selected:
            answers = served.answers(prompts, ratio)
        assert answers == [served.engine_answer(one, recompute_ratio=ratio) for one in prompts]
        ours = [served.engine.prefill(one, recompute_ratio=ratio).recomputed.tolist() for one in prompts]
        assert selected == [set(positions) for positions in ours]
    served.forget_prefixes()
    assert served.answers(prompts, 1.0) == served.full(prompts)
    assert served.full(prompts) == [served.engine_answer(one, strategy="full_prefill") for one in prompts]
    found = served.stages.support.layers
    assert [layer.sliding_window for layer in found] == [96 if kind == "mistral-window" else None] * 4


def test_chunks_are_encoded_as_transformers_encodes_them(serve):
    served = serve("qwen3")
    keys = served.register([text_of(70)])
    cache = served.planner._store.find(keys[0], fingerprint=served.planner._identity.fingerprint, input_ids=None).cache
    engine = served.engine
    ours = engine.store.find(
        engine.identity.key(cache.input_ids.tolist()), fingerprint=engine.identity.fingerprint, input_ids=None
    ).cache
    for one, other in zip((*cache.keys, *cache.values), (*ours.keys, *ours.values), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_short_batch_and_chunked_prefill(serve):
    """Stage rows are few; what vLLM prefills by itself comes in parts of 192 beside them."""
    served = serve(max_num_batched_tokens=192, enable_chunked_prefill=True)
    prompts = prompts_of(served, count=4)
    ids = [served.ids(prompt) for prompt in prompts]
    assert min(map(len, ids)) > 256
    mixed = served.run(ids * 2, [{"recompute_ratio": 0.1}] * 4 + [{"enabled": False}] * 4)
    assert [reuse(output).get("status") for output in mixed] == ["reused"] * 4 + [None] * 4
    expected = [served.engine_answer(one, recompute_ratio=0.1) for one in prompts]
    expected += [served.engine_answer(one, strategy="full_prefill") for one in prompts]
    assert [tokens(output) for output in mixed] == expected
    # What one forward cannot hold goes in parts, of which the later ones see the rows of those before.
    served.forget_prefixes()
    for ratio in (0.75, 1.0):
        (long,) = served.run(ids[:1], [{"recompute_ratio": ratio}])
        assert (reuse(long)["status"], reuse(long)["row_layers"] > 192 * 4) == ("reused", True)
        assert tokens(long) == served.engine_answer(prompts[0], recompute_ratio=ratio)
    assert tokens(long) == expected[4]
    # A question that it cannot hold is left to vLLM.
    question = [{"role": "user", "content": f"{served.texts[0]}\n\n{text_of(200, seed=7)}"}]
    (asked,) = served.run([served.ids(question)], [{}])
    assert (asked.kv_transfer_params, tokens(asked)) == (None, served.engine_answer(question, strategy="full_prefill"))


def test_admission_keeps_to_the_limit_of_a_step(serve):
    served = serve(extra={"max_stage_tokens": 100})
    prompts = prompts_of(served, count=4)
    steps = []
    run = served.stages.run
    served.stages.run = lambda plan: steps.append(len(plan.loads)) or run(plan)
    answers = served.answers(prompts, 0.25)
    assert answers == [served.engine_answer(one, recompute_ratio=0.25) for one in prompts]
    assert [number for number in steps if number] == [1, 1, 1, 1]


def test_preempted_requests_go_on_as_they_were(serve):
    served = serve(num_gpu_blocks_override=64, max_num_seqs=4, max_model_len=1024)
    prompts = prompts_of(served, count=4)
    preempted = []
    scheduler = served.scheduler
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **more: preempted.append(args[0]) or preempt(*args, **more)
    output = served.run([served.ids(prompt) for prompt in prompts], [{"recompute_ratio": 0.25}] * 4, max_tokens=200)
    assert preempted
    alone = []
    for prompt in prompts:
        served.forget_prefixes()
        alone += served.run([served.ids(prompt)], [{"recompute_ratio": 0.25}], max_tokens=200)
    assert [tokens(one) for one in output] == [tokens(one) for one in alone]


def test_caches_outlive_the_server_and_deleted_ones_are_not_used(serve):
    served = serve()
    prompts = prompts_of(served, count=1)
    (expected,) = served.answers(prompts, 0.25)
    store, keys = served.planner._store, list(served.planner.chunks._index._ids)
    served.close()
    again = serve()
    again.engine.add_chunks([text_of(70, seed=seed) for seed in range(4)])
    (output,) = again.run([again.ids(prompts[0])], [{"recompute_ratio": 0.25}])
    assert tokens(output) == expected
    assert len(reuse(output)["chunks"]) == 4
    again.planner._store.delete(keys[:2])
    again.forget_prefixes()
    (output,) = again.run([again.ids(prompts[0])], [{"recompute_ratio": 0.25}])
    assert {chunk["key"] for chunk in reuse(output)["chunks"]} == set(keys[2:])
    assert store.directory == again.planner._store.directory


def test_bfloat16_agrees_with_the_engine(serve):
    served = serve(dtype="bfloat16")
    prompts = prompts_of(served)
    with served.selections() as selected:
        served.answers(prompts, 0.25)
    for one, found in zip(prompts, selected, strict=True):
        ours = set(served.engine.prefill(one, recompute_ratio=0.25).recomputed.tolist())
        assert len(found) == len(ours)
        assert len(found & ours) >= 0.95 * len(ours)  # rounding moves the last of them


def test_a_quantised_checkpoint(tmp_path):
    """8-bit weights and activations: chunks are encoded by the quantised layers, and recomputed by them."""
    plain = save_tiny(tmp_path / "plain", **SHAPE)
    served = Served(
        quantize(save_tiny(tmp_path / "model", **SHAPE)),
        tmp_path / "caches",
        engine_model=plain,
        block_size=32,
    )
    try:
        prompts = prompts_of(served)
        assert served.llm.llm_engine.vllm_config.model_config.quantization == "compressed-tensors"
        with served.selections() as selected:
            outputs = served.run([served.ids(one) for one in prompts], [{"recompute_ratio": 0.25}] * 2)
        assert [reuse(output)["status"] for output in outputs] == ["reused"] * 2
        # Close to the unquantised model's choice, as rounding goes; and by ratio 1 the quantised model's own prefill.
        for one, found in zip(prompts, selected, strict=True):
            ours = set(served.engine.prefill(one, recompute_ratio=0.25).recomputed.tolist())
            assert len(found) == len(ours)
            assert len(found & ours) >= 0.8 * len(ours)
        served.forget_prefixes()
        everything = served.answers(prompts, 1.0)
        # Activations are rounded to 8 bits, so that the last bit of an attention may change a later token.
        assert [one[:2] for one in everything] == [one[:2] for one in served.full(prompts)]
    finally:
        served.close()
