"""The bound on tokens of the prompts under way: how many caches there are, and that the long ones get their turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from tests.generation.test_batch import EACH, LENGTHS, PROMPTS, ask, make_engine, patient, watching
from tests.tiny import text_of

__all__ = ["patient"]


def tokens_of(engine: ProphetKVEngine, prompt: Any, length: int) -> int:
    """A prompt's and its answer's."""
    return engine.read(prompt).num_tokens + length


def most_under_way(engine: ProphetKVEngine) -> tuple[list[list[int]], list[int]]:
    """Answer all prompts at once; returns their answers and the tokens under way whenever a prefill ended."""
    under_way, seen = dict[int, int](), list[int]()
    prefill, leave = type(engine._prefiller).reuse, engine.turns.leave

    def counted(self: Any, layout: Any, *args: Any) -> Any:
        result = prefill(self, layout, *args)
        under_way[id(self.model_lock)] = layout.num_tokens + self.model_lock.answer_tokens
        seen.append(sum(under_way.values()))
        return result

    def left(caller: Any) -> None:
        under_way.pop(id(caller), None)
        leave(caller)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine._prefiller), "reuse", counted)
        patch.setattr(engine.turns, "leave", left)
        with ThreadPoolExecutor(len(CHUNKED)) as pool:
            futures = [pool.submit(engine.generate, PROMPTS[number], **EACH[number]) for number in CHUNKED]
            return [list(future.result().token_ids) for future in futures], seen


CHUNKED = [number for number in range(len(PROMPTS)) if number != 3]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("batch_prefill", [False, True])
def test_no_more_tokens_than_there_is_room_for(batch_prefill: bool) -> None:
    free = make_engine(batch_prefill=batch_prefill)
    sizes = sorted(tokens_of(free, PROMPTS[number], LENGTHS[number]) for number in CHUNKED)
    answers, seen = most_under_way(free)
    bound = sizes[-1] + sizes[-2]
    assert max(seen) > bound, "nothing would have to wait"
    engine = make_engine(batch_prefill=batch_prefill, max_batch_tokens=bound)
    found, seen = most_under_way(engine)
    assert found == answers
    assert sizes[-1] < max(seen) <= bound


@pytest.mark.usefixtures("patient")
def test_a_prompt_that_is_longer_than_the_bound_is_answered_by_itself() -> None:
    engine = make_engine(max_batch_tokens=1)
    alone = [engine.generate(prompt, **more).token_ids for prompt, more in zip(PROMPTS, EACH, strict=True)]
    with watching(engine) as rows:
        answers = engine.generate_batch(PROMPTS, each=EACH)
    assert [answer.token_ids for answer in answers] == alone
    assert rows.count(1) == sum(LENGTHS) - len(LENGTHS)  # no forward has two answers' tokens


@pytest.mark.usefixtures("patient")
def test_short_prompts_do_not_overtake_a_long_one_for_ever() -> None:
    engine = make_engine(max_batch_tokens=600)
    running, short = ask(0, 0), ask(3, 0)
    long = [{"role": "user", "content": text_of(450)}]
    counts = [engine.read(prompt).num_tokens for prompt in (running, long, short)]
    assert counts[0] + counts[1] > 500 > counts[0] + counts[2] + 100

    def until(condition: Callable[[], bool]) -> None:
        while not condition():
            threading.Event().wait(0.002)

    with watching(engine) as rows, ThreadPoolExecutor(2) as pool:
        pieces = engine.stream(running, max_new_tokens=100)
        next(pieces)  # under way
        begun, futures = len(rows), []
        for number, prompt in enumerate((long, short), 1):
            futures.append(pool.submit(engine.generate, prompt, max_new_tokens=2))
            until(lambda number=number: len(engine.turns._waiting) == number or rows[begun:])  # type: ignore[misc]
        assert rows[begun:] == [], "somebody went where there is no room, or out of turn"
        pieces.close()
        assert [len(future.result().token_ids) for future in futures] == [2, 2]
        assert [count for count in rows if count > 2] == counts


def test_bad_input_is_told() -> None:
    for value in (0, -1, True):
        with pytest.raises(ValueError, match=f"max_batch_tokens is {value}; it must be at least 1"):
            ProphetKVConfig(max_batch_tokens=value)
