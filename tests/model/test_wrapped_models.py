"""Models that were compiled, wrapped or placed by others: right answers, or a refusal that says why."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from prophetkv_rag import Prompt, ProphetKVEngine, UnsupportedModelError
from prophetkv_rag.model import model_lock
from prophetkv_rag.model.uncompiled import uncompiled
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

accelerate = pytest.importorskip("accelerate")


def compiled(part: Any) -> Any:
    return torch.compile(part, backend="eager")


def the_model(model: Any) -> Any:
    return compiled(model)


def the_model_for_real(model: Any) -> Any:
    return torch.compile(model)


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def its_forward(model: Any) -> Any:
    model.forward = compiled(model.forward)
    return model


def its_forward_twice(model: Any) -> Any:
    model.forward = compiled(compiled(model.forward))
    return model


def its_backbone(model: Any) -> Any:
    model.model = compiled(model.model)
    return model


def its_layers(model: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = compiled(layer)
    return model


def its_layers_in_place(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    return model


def its_attention(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.forward = compiled(layer.self_attn.forward)
    return model


def its_regions(model: Any) -> Any:
    return accelerate.utils.compile_regions(model, backend="eager")


def its_class(model: Any) -> Any:
    class Compiled(LlamaForCausalLM):
        forward = compiled(LlamaForCausalLM.forward)

    model.__class__ = Compiled
    return model


COMPILED = [
    the_model,
    the_model_for_real,
    in_place,
    its_forward,
    its_forward_twice,
    its_backbone,
    its_layers,
    its_layers_in_place,
    its_attention,
    its_regions,
    its_class,
]


def outcome(engine: ProphetKVEngine, strategy: str) -> list[torch.Tensor]:
    """Logits of prompts of many lengths: a compiler specialises on the first and fails, or compiles, at the next."""
    found = []
    for number in (1, 2, 3):
        engine.add_chunks(CORPUS[:number])
        for question in (" when?", " when was it built, and by whom, please?"):
            prompt = Prompt("Context: ", list(CORPUS[:number]), question, glue="\n\n")
            for ratio in (0.2, 1.0):
                found.append(engine.prefill(prompt, strategy=strategy, recompute_ratio=ratio).logits)
            found.append(engine.prefill(prompt, strategy="full_prefill").logits)
    return found


@pytest.mark.parametrize("strategy", ["prophetkv", "cacheblend"])  # the second prunes by hooks between layers
@pytest.mark.parametrize("compile_it", COMPILED)
def test_a_compiled_model_answers_as_it_would_uncompiled(compile_it: Callable[[Any], Any], strategy: str) -> None:
    torch.compiler.reset()
    plain = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    engine = ProphetKVEngine(compile_it(tiny_llama()), tiny_tokenizer())
    assert engine.identity == plain.identity
    assert engine.support == plain.support
    for mine, theirs in zip(outcome(engine, strategy), outcome(plain, strategy), strict=True):
        assert torch.equal(mine, theirs)
    prompt = Prompt("Context: ", list(CORPUS[:3]), " why?", glue="\n\n")
    assert engine.generate(prompt, max_new_tokens=6).token_ids == plain.generate(prompt, max_new_tokens=6).token_ids


@pytest.mark.parametrize("compile_it", COMPILED)
def test_compiling_after_the_engine_was_made_changes_nothing(compile_it: Callable[[Any], Any]) -> None:
    torch.compiler.reset()
    model = tiny_llama()
    plain, engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer()), ProphetKVEngine(model, tiny_tokenizer())
    compile_it(model)
    for mine, theirs in zip(outcome(engine, "prophetkv"), outcome(plain, "prophetkv"), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("compile_it", COMPILED)
def test_the_callers_model_stays_compiled(compile_it: Callable[[Any], Any]) -> None:
    torch.compiler.reset()
    ids = torch.arange(3, 30)[None]
    model = compile_it(tiny_llama())

    def compilers_calls() -> list[Any]:
        calls = []
        for module in model.modules():
            calls += [vars(module).get("_compiled_call_impl"), vars(module).get("forward"), type(module).forward]
        return calls

    before = compilers_calls()
    engine = ProphetKVEngine(model, tiny_tokenizer())
    engine.generate("Hello there", max_new_tokens=2)
    assert all(mine is theirs for mine, theirs in zip(compilers_calls(), before, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny_llama()(ids).logits)


def test_another_threads_call_meanwhile_runs_uncompiled_and_is_right() -> None:
    model, ids, found = its_layers(tiny_llama()), torch.arange(3, 30)[None], list[torch.Tensor]()

    def call() -> None:
        with torch.no_grad():
            found.append(model(ids).logits)

    with model_lock(model), uncompiled(model):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    with torch.no_grad():
        torch.testing.assert_close(found[0], tiny_llama()(ids).logits)


def test_wrappers_without_a_configuration_are_refused_with_what_is_inside() -> None:
    with pytest.raises(UnsupportedModelError, match=r"DataParallel is not .* give ProphetKVEngine\(model\.module"):
        ProphetKVEngine(torch.nn.DataParallel(tiny_llama()), None)


@pytest.mark.parametrize("thing", [object(), None, "a name", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(thing: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="not a transformers causal language model; give a model as"):
        ProphetKVEngine(thing, None)


def offloaded_to_cpu(directory: Path) -> Any:
    return accelerate.cpu_offload(tiny_llama(), execution_device="cpu")


def offloaded_to_disk(directory: Path) -> Any:
    return accelerate.disk_offload(tiny_llama(), str(directory), execution_device="cpu")


def never_loaded(directory: Path) -> Any:
    with torch.device("meta"):
        return tiny_llama()


@pytest.mark.parametrize("make", [offloaded_to_cpu, offloaded_to_disk, never_loaded])
def test_weights_that_are_not_in_memory_are_refused(make: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"not in memory .*load it whole onto one device"):
        ProphetKVEngine(make(tmp_path), None)


def test_weights_on_several_devices_are_refused() -> None:
    model = tiny_llama()

    # No second device is needed to be seen on one: any parameter that says so is enough.
    class Elsewhere(torch.nn.Parameter):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda:1")

    model.model.norm.weight = Elsewhere(model.model.norm.weight.data)
    with pytest.raises(UnsupportedModelError, match=r"several devices \(cpu, cuda:1\); load it whole"):
        ProphetKVEngine(model, None)


def test_hooks_that_keep_a_model_on_one_device_do_no_harm() -> None:
    plain = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    model = accelerate.dispatch_model(tiny_llama(), {"": "cpu"}, force_hooks=True)
    engine = ProphetKVEngine(model, tiny_tokenizer())
    assert engine.identity == plain.identity
    for mine, theirs in zip(outcome(engine, "cacheblend"), outcome(plain, "cacheblend"), strict=True):
        assert torch.equal(mine, theirs)


def test_a_forward_wrapped_in_autocast_is_refused() -> None:
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(tiny_llama(), evaluation_mode=True)
    with pytest.raises(UnsupportedModelError, match="a forward in autocast"):
        ProphetKVEngine(model, tiny_tokenizer())
