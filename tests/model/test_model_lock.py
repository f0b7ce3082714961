"""One model, many threads: engines keep out of each other's way, and other people's calls are served or refused."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.errors import UnsupportedModelError
from prophetkv_rag.model.attention import AttentionPass, attention_implementation, model_lock
from prophetkv_rag.model.probe import probe_model
from tests import families
from tests.tiny import tiny_llama

CONFIG = ProphetKVConfig(encoding_prefix=(1, 5, 6))
CHUNKS = [[(7 * i + 3 * j) % 400 + 3 for j in range(30 + i)] for i in range(40)]


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads change places as often as Python allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_all(*works: Callable[[], None]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def prompts() -> list[Prompt]:
    return [Prompt([1, 5], CHUNKS[i : i + 3], [9, 8, 7 + i]) for i in range(0, 39, 3)]


def stored_tensors(engine: ProphetKVEngine) -> list[torch.Tensor]:
    found = []
    for chunk in CHUNKS:
        cache, _ = engine.store.get(
            engine.identity.key(chunk), fingerprint=engine.identity.fingerprint, input_ids=chunk
        )
        assert cache is not None
        found += [*cache.keys, *cache.values]
    return found


def test_engines_on_one_model_in_many_threads_do_not_disturb_each_other(impatient: None) -> None:
    alone = ProphetKVEngine(tiny_llama(), None, config=CONFIG)
    alone.add_chunks(CHUNKS)
    expected = [alone.prefill(prompt).logits for prompt in prompts()]

    model = tiny_llama()
    engines = [ProphetKVEngine(model, None, config=CONFIG) for _ in range(2)]
    answers: dict[int, list[torch.Tensor]] = {}
    made: list[ProphetKVEngine] = []

    def index_and_ask(number: int) -> None:
        engine = engines[number]
        for chunk in CHUNKS:
            engine.add_chunks([chunk])
        answers[number] = [engine.prefill(prompt).logits for prompt in prompts()]

    def construct() -> None:
        made.extend(ProphetKVEngine(model, None, config=CONFIG) for _ in range(6))

    assert run_all(lambda: index_and_ask(0), lambda: index_and_ask(1), construct) == []
    for number, engine in enumerate(engines):
        for actual, wanted in zip(stored_tensors(engine), stored_tensors(alone), strict=True):
            torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)
        for logits, wanted in zip(answers[number], expected, strict=True):
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    for engine in made:
        assert engine.support.layers[0].rope == alone.support.layers[0].rope
        assert engine.identity == engines[0].identity
    assert model.config._attn_implementation == "sdpa"


def test_engines_on_one_model_share_its_lock() -> None:
    model, other = tiny_llama(), tiny_llama()
    one, two = (ProphetKVEngine(model, None, config=CONFIG) for _ in range(2))
    assert one.model_lock is two.model_lock is model_lock(model)
    assert model_lock(other) is not one.model_lock
    wrapper = copy.copy(model)  # as adapters' wrappers do, it shows the same configuration
    assert model_lock(wrapper) is one.model_lock


def test_probing_waits_for_the_model() -> None:
    model = tiny_llama()
    is_held, ran_meanwhile = True, []
    hook = model.model.register_forward_pre_hook(lambda *_: ran_meanwhile.append(is_held))
    with model_lock(model):
        thread = threading.Thread(target=lambda: probe_model(model))
        thread.start()
        thread.join(0.3)  # time to go wrong in; nothing is expected by then
        is_held = False
    thread.join()
    hook.remove()
    assert ran_meanwhile
    assert not any(ran_meanwhile)


class Nothing(AttentionPass):
    def attend(self, call: Any) -> torch.Tensor:
        raise AssertionError


def call_during_a_pass(model: Any, ids: torch.Tensor) -> Any:
    """What a plain call in another thread gives while a pass (here, a probe that draws odd masks) is running."""
    results: list[Any] = []

    def call() -> None:
        with torch.no_grad():
            results.append(model(ids).logits)

    def no_mask(**kwargs: Any) -> torch.Tensor:
        return torch.zeros(1, 1, 1, 1)

    with attention_implementation(model, Nothing(), mask_function=no_mask):
        errors = run_all(call)
    return errors[0] if errors else results[0]


def test_somebody_elses_call_gets_sdpa_while_a_pass_runs() -> None:
    model, ids = tiny_llama(), torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = model(ids).logits
    assert torch.equal(call_during_a_pass(model, ids), expected)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "llama"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_somebody_elses_call_never_loses_soft_capping_or_sinks(name: str, attention: str) -> None:
    model, ids = families.SUPPORTED[name](), torch.arange(3, 40)[None]
    model.config._attn_implementation = attention
    found = call_during_a_pass(model, ids)
    if (name, attention) == ("llama", "sdpa"):
        assert isinstance(found, torch.Tensor)
    else:
        assert isinstance(found, RuntimeError)
        assert "with engine.model_lock" in str(found)
    assert model.config._attn_implementation == attention


def test_a_refused_model_is_left_as_it_was() -> None:
    model = families.REFUSED["falcon"]()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError):
        probe_model(model)
    assert model.config._attn_implementation == before
