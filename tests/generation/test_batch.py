"""Several prompts at once: the answers are those of one by one, and the model runs as few forwards as that takes."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from prophetkv_rag import ContextWindowError, Grammar, InputError, ProphetKVConfig, ProphetKVEngine, StreamChunk
from prophetkv_rag.generation import turns
from prophetkv_rag.model import (
    CACHE_NAME,
    PassJob,
    RowsPass,
    StepPass,
    cache_argument,
    complete_cache,
    plain_forward,
    probe_model,
    run_packed,
)
from tests import families
from tests.forked import Child
from tests.held_back import held_back
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

FAMILIES = (
    *("llama_yarn", "qwen2_sliding", "qwen3_moe", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt_neox", "glm4"),
    *("cohere2", "smollm3", "llama4_text", "nemotron", "persimmon", "stablelm_parallel"),
)
"""Grouped heads, sliding windows, soft-capping, sinks, experts, partial and interleaved rotation, layers without it."""


def ask(number: int, chunks: int = 2) -> list[dict[str, str]]:
    context = "\n\n".join(CORPUS[(number + i) % len(CORPUS)] for i in range(chunks))
    return [{"role": "user", "content": f"Context:\n{context}\n\nQuestion {number}: Who watches?"}]


PROMPTS = [ask(0), ask(1, 3), ask(2, 1), ask(3, 0), ask(4, 4), ask(5)]
LENGTHS = [3, 17, 1, 9, 12, 6]
EACH = [{"max_new_tokens": length} for length in LENGTHS]


def make_engine(**settings: Any) -> ProphetKVEngine:
    config = ProphetKVConfig(**({"remember": False, "batch_prefill": True} | settings))
    made = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=config)
    made.end_tokens = frozenset()  # answers are as long as they are asked for
    made.add_chunks(CORPUS[:6])
    for prompt in PROMPTS:  # what the first prompt with a chunk first computes once
        made.prefill(prompt)
    return made


@pytest.fixture(scope="module")
def engine() -> ProphetKVEngine:
    return make_engine()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards wait for all who will be back, so that what shares one does not hang on the machine's load."""
    monkeypatch.setattr(turns, "PATIENCE", 1e9)
    monkeypatch.setattr(turns, "PATIENCE_S", 60.0)


@pytest.fixture
def rows(engine: ProphetKVEngine) -> Iterator[list[int]]:
    """The rows of each forward so far."""
    with watching(engine) as seen:
        yield seen


class watching:
    def __init__(self, engine: ProphetKVEngine) -> None:
        self.engine, self.seen = engine, list[int]()

    def __enter__(self) -> list[int]:
        self.hook = self.engine.model.model.register_forward_hook(
            lambda module, args, kwargs, output: self.seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        return self.seen

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()


# --- the forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_forward_is_each_prompts_own(family: str) -> None:
    """Three prompts of other lengths (longer than the windows), one of which adds two tokens: logits and caches equal
    those of the model's own forward over each whole sequence by itself."""
    model = families.SUPPORTED[family]()
    support = probe_model(model)
    generator = torch.Generator().manual_seed(7)
    jobs, expected = [], []
    for length, more in ((40, 1), (23, 2), (31, 1)):
        ids = torch.randint(1, families.VOCAB_SIZE, (1, length + more), generator=generator)
        cache = DynamicCache()
        plain_forward(model, ids[:, :length], cache)
        growing = complete_cache(cache)
        whole = DynamicCache()
        with torch.no_grad():
            logits = model(ids, **cache_argument(model, whole), use_cache=True).logits[:, -1].float()
        expected.append((logits, whole))
        positions = torch.arange(length, length + more)
        jobs.append(PassJob(StepPass(support.layers, positions), ids[:, length:], positions[None], growing.layers))
    found = run_packed(model, jobs, logits=[True, True, True])
    for job, logits, (own_logits, own) in zip(jobs, found, expected, strict=True):
        torch.testing.assert_close(logits, own_logits, atol=1e-4, rtol=1e-4)
        for layer, other in zip(job.layers, own.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer.values, other.values, atol=1e-4, rtol=1e-4)


def test_logits_only_where_they_are_wanted() -> None:
    model = tiny_llama()
    support = probe_model(model)
    jobs = []
    for length in (5, 6, 7):
        cache = DynamicCache()
        plain_forward(model, torch.arange(3, 3 + length)[None], cache)
        position = torch.tensor([length])
        layers = complete_cache(cache).layers
        jobs.append(PassJob(RowsPass(support.layers, position), torch.tensor([[9]]), position[None], layers))
    found = run_packed(model, jobs, logits=[False, True, False])
    assert [logits is None for logits in found] == [True, False, True]
    cache = DynamicCache()
    plain_forward(model, torch.arange(3, 9)[None], cache)
    torch.testing.assert_close(found[1], plain_forward(model, torch.tensor([[9]]), cache))


# --- the answers ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("batch_prefill", [False, True], ids=["decoded together", "stages too"])
def test_the_answers_are_those_of_one_by_one(batch_prefill: bool) -> None:
    """Mixed lengths of prompts and answers, one prompt without any chunk."""
    engine = make_engine(batch_prefill=batch_prefill)
    with watching(engine) as rows:
        alone = [engine.generate(prompt, **more) for prompt, more in zip(PROMPTS, EACH, strict=True)]
    with watching(engine) as shared, held_back(engine, len(PROMPTS)):
        answers = engine.generate_batch(PROMPTS, each=EACH)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
    assert [answer.text for answer in answers] == [answer.text for answer in alone]
    assert [len(answer.token_ids) for answer in answers] == LENGTHS
    for answer, own in zip(answers, alone, strict=True):
        assert answer.finish_reason == own.finish_reason == "length"
        found, expected = (report.to_dict() | {"timings_s": None} for report in (answer.report, own.report))
        assert found == expected
        if own.report.view.scores is not None:
            torch.testing.assert_close(answer.report.view.scores, own.report.view.scores, atol=1e-5, rtol=1e-4)
    # A token is run once, but for an answer's last: nobody waits for what follows that.
    assert rows.count(1) == sum(LENGTHS) - len(LENGTHS)
    assert sum(shared) == sum(rows), "rows were run that one by one are not"
    num_stages = len([count for count in rows if count > 1])
    assert len(shared) <= max(LENGTHS) + num_stages, "answers did not share their forwards"
    if batch_prefill:
        assert len([count for count in shared if count > len(PROMPTS)]) < num_stages, "stages did not"


@pytest.mark.usefixtures("patient")
def test_at_ratio_1_it_is_the_models_own_answer(engine: ProphetKVEngine) -> None:
    answers = engine.generate_batch(PROMPTS, max_new_tokens=8, recompute_ratio=1.0)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = engine.read(prompt).input_ids[None]
        for token in answer.token_ids:
            with torch.no_grad():
                assert token == int(engine.model(ids).logits[0, -1].argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.usefixtures("patient")
def test_each_has_its_own_settings(engine: ProphetKVEngine) -> None:
    """Sampling with seeds, stop strings, a grammar, another strategy: side by side with greedy ones."""
    whole = engine.generate(PROMPTS[1], max_new_tokens=12)
    each: list[dict[str, Any]] = [
        {"temperature": 1.3, "seed": 7},
        {"stop": [whole.text[3:6]]},
        {"grammar": Grammar.json_schema({"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]})},
        {"temperature": 0.9, "top_p": 0.8, "seed": 8},
        {"strategy": "full_reuse"},
        {"strategy": "cacheblend"},
    ]
    alone = [engine.generate(prompt, max_new_tokens=24, **more) for prompt, more in zip(PROMPTS, each, strict=True)]
    answers = engine.generate_batch(PROMPTS, each=each, max_new_tokens=24)
    assert [(answer.token_ids, answer.finish_reason) for answer in answers] == [
        (answer.token_ids, answer.finish_reason) for answer in alone
    ]
    assert answers[2].text in ('{"n": 1}', '{"n": 22}')
    assert answers[4].report.strategy == "full_reuse"


@pytest.mark.usefixtures("patient")
def test_one_is_cancelled_in_the_middle(engine: ProphetKVEngine) -> None:
    alone = [engine.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
    cancel = threading.Event()
    ended = []

    def at_step(*_: Any) -> None:
        ended.append(1)
        if len(ended) == len(PROMPTS) + 5:
            cancel.set()

    hook = engine.model.register_forward_hook(at_step)
    try:
        answers = engine.generate_batch(PROMPTS, each=[{}, {"cancel": cancel}, {}, {}, {}, {}], max_new_tokens=12)
    finally:
        hook.remove()
    assert answers[1].finish_reason == "cancelled"
    assert 0 < len(answers[1].token_ids) < 12
    assert answers[1].token_ids == alone[1].token_ids[: len(answers[1].token_ids)]
    assert [answer.token_ids for answer in answers[2:]] == [answer.token_ids for answer in alone[2:]]


@pytest.mark.usefixtures("patient")
def test_one_that_fails_does_not_spoil_the_others(engine: ProphetKVEngine) -> None:
    alone = [engine.generate(prompt, max_new_tokens=5) for prompt in PROMPTS]
    prompts = [*PROMPTS[:2], "", "word " * 5000, *PROMPTS[2:]]
    found = engine.generate_batch(prompts, max_new_tokens=5, return_exceptions=True)
    assert isinstance(found[2], InputError)
    assert isinstance(found[3], ContextWindowError)
    others = [answer for answer in found if not isinstance(answer, Exception)]
    assert [answer.token_ids for answer in others] == [answer.token_ids for answer in alone]
    with pytest.raises(InputError):
        engine.generate_batch(prompts, max_new_tokens=5)
    assert engine.generate(PROMPTS[0], max_new_tokens=5).token_ids == alone[0].token_ids


@pytest.mark.usefixtures("patient")
def test_a_forward_that_fails_is_tried_alone(engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for want of memory, half way through the layers; each answer goes on as if nothing had been."""
    alone = [engine.generate(prompt, **more) for prompt, more in zip(PROMPTS, EACH, strict=True)]
    failed = []

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if len(failed) < 5 and kwargs[CACHE_NAME].layers[0].__class__.__name__ == "_PackedLayer":
            failed.append(1)
            raise RuntimeError("out of memory")

    hook = engine.model.model.layers[2].register_forward_pre_hook(fail, with_kwargs=True)
    try:
        answers = engine.generate_batch(PROMPTS, each=EACH)
    finally:
        hook.remove()
    assert len(failed) == 5
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
    for answer, own in zip(answers, alone, strict=True):
        if own.report.view.scores is not None:  # the stages were among those that failed
            torch.testing.assert_close(answer.report.view.scores, own.report.view.scores, atol=1e-5, rtol=1e-4)


def test_on_a_cpu_each_prompt_is_prefilled_by_itself() -> None:
    assert not ProphetKVEngine(tiny_llama(), tiny_tokenizer()).turns.shares_passes
    assert make_engine(batch_prefill=True).turns.shares_passes
    assert not make_engine(batch_prefill=True, max_batch=1).turns.shares_passes


def test_bad_input_is_told(engine: ProphetKVEngine) -> None:
    assert engine.generate_batch([]) == []
    with pytest.raises(InputError, match="one text; give a list of prompts"):
        engine.generate_batch("Who watches?")
    with pytest.raises(InputError, match="6 prompts and 1 entries"):
        engine.generate_batch(PROMPTS, each=[{}])
    with pytest.raises(ValueError, match="max_batch is 0"):
        ProphetKVConfig(max_batch=0)


# --- calls from many threads ------------------------------------------------------------------------------------------


def stream(engine: ProphetKVEngine, prompt: Any) -> Generator[StreamChunk, None, None]:
    """An answer that comes in pieces: the greedy one of a tiny model may be one unfinished character."""
    return engine.stream(prompt, max_new_tokens=30, temperature=1.0, seed=3)


@pytest.mark.usefixtures("patient")
def test_streams_of_many_threads_share_forwards(engine: ProphetKVEngine, rows: list[int]) -> None:
    alone = [[piece.delta for piece in stream(engine, prompt)] for prompt in PROMPTS]
    num_alone = len(rows)
    rows.clear()
    with ThreadPoolExecutor(6) as pool, held_back(engine, len(PROMPTS)):
        streamed = list(pool.map(lambda prompt: [piece.delta for piece in stream(engine, prompt)], PROMPTS))
    assert streamed == alone
    assert len(rows) < num_alone / 2


@pytest.mark.usefixtures("patient")
def test_no_more_caches_than_a_forward_takes() -> None:
    engine = make_engine(max_batch=2)
    alone = [engine.generate(prompt, **more) for prompt, more in zip(PROMPTS, EACH, strict=True)]
    under_way, most = set[int](), [0]
    prefill, leave = engine._prefiller.__class__.reuse, engine.turns.leave

    def counted(self: Any, *args: Any) -> Any:
        result = prefill(self, *args)
        under_way.add(id(self.model_lock))
        most[0] = max(most[0], len(under_way))
        return result

    def left(caller: Any) -> None:
        under_way.discard(id(caller))
        leave(caller)

    with pytest.MonkeyPatch.context() as patch, watching(engine) as rows:
        patch.setattr(type(engine._prefiller), "reuse", counted)
        patch.setattr(engine.turns, "leave", left)
        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(engine.generate, prompt, **more) for prompt, more in zip(PROMPTS, EACH, strict=True)]
            answers = [future.result() for future in futures]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
    assert most[0] == 2
    assert 2 in rows


def test_a_stream_that_nobody_reads_on_holds_nobody_up() -> None:
    engine = make_engine(max_batch=1)
    left_standing = [stream(engine, prompt) for prompt in PROMPTS[:3]]
    for pieces in left_standing:
        assert next(pieces).finish_reason is None
    answers = engine.generate_batch(PROMPTS[3:], max_new_tokens=4)
    assert [len(answer.token_ids) for answer in answers] == [4, 4, 4]
    assert [list(pieces)[-1].finish_reason for pieces in left_standing] == ["length"] * 3


def test_whoever_holds_the_model_is_answered_first(engine: ProphetKVEngine) -> None:
    """A thread that holds `model_lock` must not wait for a turn that only it could let begin."""
    expected = engine.generate(PROMPTS[0], max_new_tokens=6).token_ids
    with ThreadPoolExecutor(3) as pool:
        with engine.model_lock:
            others = [pool.submit(engine.generate, prompt, max_new_tokens=6) for prompt in PROMPTS[1:4]]
            assert engine.generate(PROMPTS[0], max_new_tokens=6).token_ids == expected
        assert [len(other.result().token_ids) for other in others] == [6, 6, 6]


def test_a_model_that_changed_is_noticed_by_all(engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def changed() -> None:
        calls.append(1)
        raise InputError("changed")

    made = make_engine()
    monkeypatch.setattr(made.library.state, "check_adapters", changed)
    made.turns._check = changed
    found = made.generate_batch(PROMPTS[:3], max_new_tokens=4, return_exceptions=True)
    assert [type(error) for error in found] == [InputError] * 3


def test_a_fork_amid_answers_leaves_both_sides_able(engine: ProphetKVEngine) -> None:
    expected = engine.generate(PROMPTS[0], max_new_tokens=5).token_ids
    cancel = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(engine.generate, prompt, max_new_tokens=1500, cancel=cancel) for prompt in PROMPTS[1:4]]
        child = Child(lambda: list(engine.generate(PROMPTS[0], max_new_tokens=5).token_ids))
        assert child.result() == list(expected)
        cancel.set()
        assert {other.result().finish_reason for other in others} == {"cancelled"}


def test_what_is_remembered_is_used_and_kept() -> None:
    made = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    made.end_tokens = frozenset()
    made.add_chunks(CORPUS[:6])
    first = made.generate_batch(PROMPTS[:3], max_new_tokens=5)
    turns_of = [
        [*prompt, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "And then?"}]
        for prompt, answer in zip(PROMPTS[:3], first, strict=True)
    ]
    second = made.generate_batch(turns_of, max_new_tokens=5)
    assert all(answer.report.remembered_tokens > 0 for answer in second)
