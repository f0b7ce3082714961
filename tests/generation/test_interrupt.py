"""Stopping a call from outside: while it generates, while it waits for the model, and before it has begun."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from prophetkv_rag import DeadlineError, InputError, Prompt, ProphetKVEngine
from prophetkv_rag.generation.interrupt import Interrupted, InterruptibleLock
from tests.clock import at_forward, stop_the_clock
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

PROMPT = [{"role": "user", "content": f"Context:\n{CORPUS[0]}\n\n{CORPUS[1]}\n\nQuestion: Who watches?"}]
FOREVER = 1000


@pytest.fixture(scope="module")
def engine() -> ProphetKVEngine:
    made = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    made.end_tokens = frozenset()  # answers go on until somebody stops them
    made.add_chunks(CORPUS[:2])
    return made


@pytest.fixture
def forwards(engine: ProphetKVEngine) -> Any:
    seen: list[int] = []
    handle = engine.model.register_forward_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


def in_thread(work: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_a_cancelled_stream_gives_what_it_has(engine: ProphetKVEngine, forwards: list[int]) -> None:
    cancel = threading.Event()
    pieces, seen = [], 0
    for piece in engine.stream(PROMPT, max_new_tokens=FOREVER, cancel=cancel):
        pieces.append(piece)
        if len(pieces) == 5:
            cancel.set()
            seen = len(forwards)
    assert len(forwards) == seen  # the model did not run once more
    assert [piece.finish_reason for piece in pieces] == [None] * 5 + ["cancelled"]
    last = pieces[-1]
    assert "".join(piece.delta for piece in pieces) == last.text
    alone = engine.generate(PROMPT, max_new_tokens=len(last.token_ids))
    assert (last.token_ids, last.text) == (alone.token_ids, alone.text)
    assert last.report.reused_tokens > 0


def test_held_back_text_is_given_when_cancelled(engine: ProphetKVEngine) -> None:
    whole = engine.generate(PROMPT, max_new_tokens=3).text
    cancel = threading.Event()
    stream = engine.stream(PROMPT, max_new_tokens=FOREVER, stop=[whole[:-1] + "\0", "\0"], cancel=cancel)
    with at_forward(engine.model, 3, cancel.set):
        pieces = list(stream)
    assert pieces[-1].finish_reason == "cancelled"
    assert "".join(piece.delta for piece in pieces) == pieces[-1].text != ""


def test_cancelled_before_the_prefill_is_an_empty_answer(engine: ProphetKVEngine, forwards: list[int]) -> None:
    cancel = threading.Event()
    cancel.set()
    answer = engine.generate(PROMPT, cancel=cancel)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", (), "cancelled")
    assert answer.report.prompt_tokens == answer.report.reused_tokens == 0
    assert not forwards


@pytest.mark.parametrize("deadline_s", [0.0, -3.0])
def test_a_deadline_that_has_passed_is_an_error(
    engine: ProphetKVEngine, forwards: list[int], deadline_s: float
) -> None:
    with pytest.raises(DeadlineError, match="deadline passed"):
        engine.generate(PROMPT, deadline_s=deadline_s)
    with pytest.raises(TimeoutError):
        engine.generate("no chunk in here", deadline_s=deadline_s)
    assert not forwards


def test_a_deadline_that_is_no_number_is_refused(engine: ProphetKVEngine) -> None:
    with pytest.raises(InputError, match="deadline_s is not a number"):
        engine.generate(PROMPT, deadline_s=float("nan"))


def test_a_deadline_ends_a_running_answer(engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = stop_the_clock(monkeypatch)
    with at_forward(engine.model.model, 5, clock.pass_all_deadlines) as forwards:
        answer = engine.generate(PROMPT, max_new_tokens=FOREVER, deadline_s=60)
    assert answer.finish_reason == "deadline"
    assert len(forwards) == 5
    assert 0 < len(answer.token_ids) <= 5
    assert answer.token_ids == engine.generate(PROMPT, max_new_tokens=len(answer.token_ids)).token_ids


def test_without_either_nothing_changes(engine: ProphetKVEngine) -> None:
    plain = engine.generate(PROMPT, max_new_tokens=8)
    watched = engine.generate(PROMPT, max_new_tokens=8, cancel=threading.Event(), deadline_s=600)
    assert (plain.token_ids, plain.finish_reason) == (watched.token_ids, watched.finish_reason)


@pytest.mark.parametrize("is_started", [False, True], ids=["before the prefill", "while generating"])
@pytest.mark.parametrize("by", ["cancel", "deadline"])
def test_waiting_for_the_model_ends_too(
    engine: ProphetKVEngine, is_started: bool, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else holds the model for good; the call comes back all the same."""
    cancel, clock = threading.Event(), stop_the_clock(monkeypatch)
    deadline_s = 60 if by == "deadline" else None
    stream = engine.stream(PROMPT, max_new_tokens=FOREVER, cancel=cancel, deadline_s=deadline_s)
    if is_started:
        next(stream)
    with engine.model_lock:
        thread, results = in_thread(lambda: list(stream))
        clock.wait_until_asked(8)  # it waits, for the second slice at least
        assert thread.is_alive()
        if by == "cancel":
            cancel.set()
        else:
            clock.pass_all_deadlines()
        thread.join()
    [found] = results
    if by == "deadline" and not is_started:
        assert isinstance(found, DeadlineError)
    else:
        assert found[-1].finish_reason == ("cancelled" if by == "cancel" else "deadline")
    assert engine.model_lock.acquire(blocking=False)  # nothing was left locked
    engine.model_lock.release()


def test_chunks_that_must_be_encoded_first_wait_like_the_rest(engine: ProphetKVEngine) -> None:
    cancel = threading.Event()
    with engine.model_lock:
        prompt = Prompt("Read this: ", [CORPUS[4]], " What does it say?")
        thread, results = in_thread(lambda: engine.generate(prompt, cancel=cancel))
        cancel.set()
        thread.join()
    assert results[0].finish_reason == "cancelled"


def test_the_lock_is_taken_by_one_at_a_time_and_given_back_after_an_error() -> None:
    lock = threading.RLock()
    interruptible = InterruptibleLock(lock, threading.Event())
    with pytest.raises(ZeroDivisionError), interruptible:
        _ = 1 / 0
    thread, results = in_thread(lambda: lock.acquire(blocking=False) and lock.release())
    thread.join()
    assert results == [None]
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Interrupted, match="cancelled"), InterruptibleLock(lock, cancel):
        pytest.fail("the block ran")
