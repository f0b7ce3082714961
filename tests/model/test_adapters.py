"""Adapters of `peft`: they answer like any model, or are refused; switching them later is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVEngine, UnsupportedModelError
from prophetkv_rag.errors import ModelChangedError
from prophetkv_rag.model.forward import backbone
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

peft = pytest.importorskip("peft")

CHUNKS = list(CORPUS[:3])
PROMPT = Prompt("Context: ", CHUNKS, " Question: when was it built?", glue="\n\n")


def lora(**settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        chosen = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False} | settings
        return peft.get_peft_model(tiny_llama(), peft.LoraConfig(**chosen)).eval()


def merged() -> Any:
    model = lora()
    model.merge_adapter()
    return model


def injected() -> Any:
    model = tiny_llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        try:
            model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
        except ValueError as error:  # transformers asks for a newer one, which is not published for everybody yet
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(str(error))
    return model


def scaled() -> Any:
    settings = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    return peft.get_peft_model(tiny_llama(), settings)


ADAPTED = {
    "lora": lora,
    "lora_of_a_causal_lm": lambda: lora(task_type="CAUSAL_LM"),
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True),
    "with_a_head_of_its_own": lambda: lora(modules_to_save=["lm_head"]),
    "merged": merged,
    "merged_and_unloaded": lambda: lora().merge_and_unload(),
    "injected_by_transformers": injected,
    "ia3": scaled,
    "compiled": lambda: torch.compile(lora(), backend="eager"),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapted_model_answers_as_itself(name: str) -> None:
    model = ADAPTED[name]()
    engine = ProphetKVEngine(model, tiny_tokenizer())
    assert engine.identity != ProphetKVEngine(tiny_llama(), tiny_tokenizer()).identity
    engine.add_chunks(CHUNKS)
    result = engine.prefill(PROMPT, recompute_ratio=1.0)
    assert [chunk.status for chunk in result.report.chunks] == ["hit"] * 3
    with torch.no_grad():
        expected = model(input_ids=result.input_ids).logits[:, -1]
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=1e-4)
    assert engine.generate(PROMPT, max_new_tokens=4).token_ids


def test_the_passes_run_inside_all_wrappers_and_without_the_head() -> None:
    model = lora()
    assert backbone(model) is model.base_model.model.model


def test_a_compiled_adapted_model_has_the_identity_of_the_uncompiled() -> None:
    one = ProphetKVEngine(torch.compile(lora(), backend="eager"), tiny_tokenizer())
    assert one.identity == ProphetKVEngine(lora(), tiny_tokenizer()).identity


def virtual_tokens(kind: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        chosen = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"} | settings
        return peft.get_peft_model(tiny_llama(), getattr(peft, kind)(**chosen))

    return make


def gated() -> Any:
    """An adapter whose attention goes by absolute positions; its gates are closed when it is made."""
    settings = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(0.7)
    return model


REFUSED = {
    "prompt_tuning": (virtual_tokens("PromptTuningConfig"), r"keeps 28 rows for 24 tokens.*prompt or prefix tuning"),
    "p_tuning": (virtual_tokens("PromptEncoderConfig", encoder_hidden_size=16), "keeps 28 rows for 24 tokens"),
    # Whether the prefix is told as rows or as another attention depends on how peft and transformers hand it over.
    "prefix_tuning": (virtual_tokens("PrefixTuningConfig"), "something stands before every prompt|from our own pass"),
    "activated_lora": (
        lambda: lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        "begins to act at certain tokens",
    ),
    "adaption_prompt": (gated, "cannot be used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stands_before_every_prompt_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=reason):
        ProphetKVEngine(make(), tiny_tokenizer())


def switched_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def merged_now(model: Any) -> None:
    model.merge_adapter()


def another_one(model: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")
    model.eval()


def stronger(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


def in_training_mode(model: Any) -> None:
    model.train()


def trained(model: Any) -> None:
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).add_(0.5)


def loaded_over(model: Any) -> None:
    model.load_state_dict({name: tensor + 1e-3 for name, tensor in model.state_dict().items()})


def replaced(model: Any) -> None:
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)


def in_half_precision(model: Any) -> None:
    model.bfloat16()


CHANGES = {
    switched_off: "its adapters are switched off now and were default",
    merged_now: r"its adapters are default \(merged\) now",
    another_one: "its adapters are .*other.* now and were default",
    stronger: "its adapters",
    in_training_mode: r"training mode \(model\.eval\(\) ends that\)",
    trained: "its weights were changed",
    loaded_over: "its weights were changed",
    replaced: "its weights were changed, replaced",
    in_half_precision: "its weights were changed, replaced or moved",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_engine_was_made_is_noticed(change: Callable[[Any], None]) -> None:
    model = lora()
    engine = ProphetKVEngine(model, tiny_tokenizer())
    engine.add_chunks(CHUNKS[:2])
    stored = engine.store.stats()
    change(model)
    calls: list[Callable[[], Any]] = [
        lambda: engine.add_chunks(CHUNKS),
        lambda: engine.prefill(PROMPT),
        lambda: engine.prefill("a text without any chunk"),
        lambda: engine.prefill(PROMPT, strategy="full_prefill"),
        lambda: engine.generate(PROMPT, max_new_tokens=2),
    ]
    for call in calls:
        with pytest.raises(ModelChangedError, match=f"{CHANGES[change]}.*make a new ProphetKVEngine"):
            call()
    assert engine.store.stats().chunks == stored.chunks


@pytest.mark.parametrize("change", [switched_off, merged_now, another_one, trained])
def test_a_new_engine_takes_the_model_as_it_is(change: Callable[[Any], None]) -> None:
    model = lora()
    before = ProphetKVEngine(model, tiny_tokenizer())
    before.add_chunks(CHUNKS)
    change(model)
    engine = ProphetKVEngine(model, tiny_tokenizer(), store=before.store)
    assert engine.identity.fingerprint != before.identity.fingerprint
    engine.add_chunks(CHUNKS)
    result = engine.prefill(PROMPT, recompute_ratio=1.0)
    with torch.no_grad():
        expected = model(input_ids=result.input_ids).logits[:, -1]
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=1e-4)


def test_a_change_in_the_middle_of_an_answer_is_noticed() -> None:
    model = lora()
    engine = ProphetKVEngine(model, tiny_tokenizer())
    pieces = engine.stream(PROMPT, max_new_tokens=40, temperature=1.0, seed=0)
    assert next(pieces).finish_reason is None
    switched_off(model)
    with pytest.raises(ModelChangedError):
        list(pieces)


def test_what_is_put_back_is_no_change() -> None:
    model = lora()
    engine = ProphetKVEngine(model, tiny_tokenizer())
    engine.add_chunks(CHUNKS)
    expected = engine.prefill(PROMPT).logits
    with engine.model_lock, model.disable_adapter(), torch.no_grad():
        model(torch.arange(3, 30)[None])
    assert torch.equal(engine.prefill(PROMPT).logits, expected)
