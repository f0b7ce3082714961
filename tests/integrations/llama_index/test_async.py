"""Async calls leave the event loop free, and whoever leaves early stops the generation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from itertools import zip_longest
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.schema import TextNode

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.llama_index import ProphetKVLLM
from prophetkv_rag.integrations.shared.async_stream import iterate_in_thread, last_item
from tests.integrations.conftest import cancelled_at, stream_threads, until
from tests.integrations.rag import QUESTION, build_index
from tests.tiny import text_of

MESSAGES = [ChatMessage(content="Tell me everything about the old harbour.")]


@pytest.fixture
def endless(fresh_engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch) -> ProphetKVLLM:
    """A model that goes on for 500 tokens: no token ends its answers."""
    monkeypatch.setattr(fresh_engine.model.generation_config, "eos_token_id", None)
    fresh_engine.tokenizer.eos_token = None
    engine = ProphetKVEngine(fresh_engine.model, fresh_engine.tokenizer)
    return ProphetKVLLM(engine=engine, max_new_tokens=500)


async def drain(stream: Any) -> None:
    async for _ in await stream:
        pass


@pytest.mark.parametrize("style", ["achat", "acomplete", "astream_chat", "astream_complete"])
async def test_the_loop_keeps_turning(style: str, llm: ProphetKVLLM, turns: list[int]) -> None:
    work = {
        "achat": lambda: llm.achat(MESSAGES),
        "acomplete": lambda: llm.acomplete("Hi"),
        "astream_chat": lambda: drain(llm.astream_chat(MESSAGES)),
        "astream_complete": lambda: drain(llm.astream_complete("Hi")),
    }[style]
    await work()
    assert turns


async def test_the_loop_keeps_turning_while_indexing_and_asking(
    chat_engine: ProphetKVEngine, llm: ProphetKVLLM, new_vector_store: Any, turns: list[int]
) -> None:
    index = build_index(new_vector_store(chat_engine), [])
    nodes = [TextNode(text=text_of(600, seed=i)) for i in range(4)]
    await index.ainsert_nodes(nodes)
    assert len(turns) >= 4, "the caches were computed during the await"
    turns.clear()
    await index.as_query_engine(llm=llm).aquery(QUESTION)
    assert turns


def test_closing_a_stream_stops_the_generation(endless: ProphetKVLLM, forwards: list[int]) -> None:
    stream = endless.stream_chat(MESSAGES)
    for _ in range(3):
        next(stream)
    stream.close()
    done = len(forwards)
    assert done < 20
    assert stream_threads() == [], "nobody is left who could run the model"
    assert endless.complete("Hi", max_new_tokens=1), "the engine is free again"


def test_a_handler_that_keeps_events_does_not_keep_the_engine_busy(endless: ProphetKVLLM) -> None:
    endless.callback_manager = CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])
    stream = endless.stream_chat(MESSAGES)
    next(stream)
    stream.close()
    assert endless.complete("Hi", max_new_tokens=1)


def test_interleaved_streams_do_not_wait_for_each_other(endless: ProphetKVLLM) -> None:
    one = endless.stream_complete("The museum", max_new_tokens=6)
    two = endless.stream_complete("The library", max_new_tokens=6)
    deltas = [(a.delta if a else "", b.delta if b else "") for a, b in zip_longest(one, two)]
    assert "".join(a for a, _ in deltas) == endless.complete("The museum", max_new_tokens=6).text
    assert "".join(b for _, b in deltas) == endless.complete("The library", max_new_tokens=6).text


@pytest.mark.parametrize("style", ["achat", "acomplete", "astream_chat", "aclose"])
async def test_leaving_early_stops_the_generation(style: str, endless: ProphetKVLLM, forwards: list[int]) -> None:
    if style == "aclose":
        stream = await endless.astream_chat(MESSAGES)
        await anext(stream)
        await stream.aclose()
    else:
        work: dict[str, Callable[[], Any]] = {
            "achat": lambda: endless.achat(MESSAGES),
            "acomplete": lambda: endless.acomplete("Hi"),
            "astream_chat": lambda: drain(endless.astream_chat(MESSAGES)),
        }
        task = asyncio.create_task(work[style]())
        with cancelled_at(3, endless.engine, task), pytest.raises(asyncio.CancelledError):
            await task
    await until(lambda: stream_threads() == [])  # the step that was running may end
    assert 0 < len(forwards) <= 3
    assert await endless.acomplete("Hi", max_new_tokens=1), "the engine is free again"


async def test_many_tasks_at_once_get_their_own_answers(llm: ProphetKVLLM) -> None:
    prompts = [f"Number {i} is" for i in range(12)]
    answers = await asyncio.gather(*(llm.acomplete(prompt) for prompt in prompts))
    assert [answer.text for answer in answers] == [llm.complete(prompt).text for prompt in prompts]


async def test_iterate_in_thread_computes_only_what_is_asked_for() -> None:
    log: list[Any] = []
    request = ContextVar("request", default="lost")
    request.set("mine")

    def numbers() -> Iterator[int]:
        try:
            for i in range(10):
                assert request.get() == "mine"
                assert threading.current_thread() is not threading.main_thread()
                log.append(i)
                yield i
        finally:
            log.append("closed")

    source = numbers()  # held here, so that going out of scope is not what closes it
    stream = iterate_in_thread(source)
    assert [await anext(stream), await anext(stream)] == [0, 1]
    assert log == [0, 1]
    await stream.aclose()
    await until(lambda: log[-1] == "closed")
    assert log == [0, 1, "closed"]
    assert await last_item(numbers()) == 9


async def test_errors_cross_the_thread() -> None:
    def broken() -> Iterator[int]:
        yield 1
        msg = "boom"
        raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="boom"):
        await last_item(broken())
    with pytest.raises(ValueError, match="nothing"):
        await last_item(iter_nothing())


def iter_nothing() -> Iterator[int]:
    yield from ()
