"""Async calls leave the loop free; whoever leaves early, sets the event or is out of time stops the generation."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import DeadlineError
from prophetkv_rag.integrations.langchain import ChatProphetKV, ProphetKVLLM
from tests.clock import at_forward, stop_the_clock
from tests.integrations.conftest import cancelled_at, stream_threads, until
from tests.integrations.langchain.rag import town_store
from tests.integrations.rag import QUESTION


@pytest.fixture
def endless_engine(fresh_engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch) -> ProphetKVEngine:
    """An engine whose answers no token ends."""
    monkeypatch.setattr(fresh_engine.model.generation_config, "eos_token_id", None)
    fresh_engine.tokenizer.eos_token = None
    return ProphetKVEngine(fresh_engine.model, fresh_engine.tokenizer)


@pytest.fixture(params=["chat", "completion"])
def endless(request: pytest.FixtureRequest, endless_engine: ProphetKVEngine) -> Any:
    return (ChatProphetKV if request.param == "chat" else ProphetKVLLM)(engine=endless_engine, max_tokens=500)


async def drain(stream: Any) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("style", ["ainvoke", "astream", "abatch", "aretrieve"])
async def test_the_loop_keeps_turning(style: str, chat_engine: ProphetKVEngine, turns: list[int]) -> None:
    model = ChatProphetKV(engine=chat_engine, max_tokens=6)
    store = await asyncio.to_thread(town_store, chat_engine)
    turns.clear()

    async def retrieve_and_add() -> None:
        found = await store.as_retriever().ainvoke(QUESTION)
        await store.aadd_texts([f"{document.page_content} Again." for document in found])

    await {
        "ainvoke": lambda: model.ainvoke("Hi"),
        "astream": lambda: drain(model.astream("Hi")),
        "abatch": lambda: model.abatch(["Hi", "Ho"]),
        "aretrieve": retrieve_and_add,
    }[style]()
    assert turns


def test_closing_a_stream_stops_and_frees(endless: Any, forwards: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []
    real = endless.engine._prefiller.run

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        caches.append(weakref.ref(result.past_key_values))
        return result

    monkeypatch.setattr(type(endless.engine._prefiller), "run", lambda self, *args, **kwargs: spy(*args, **kwargs))
    stream = endless.stream("Hi")
    for _ in range(3):
        next(stream)
    done = len(forwards)
    stream.close()
    assert stream_threads() == [], "nobody is left who could run the model"
    assert len(forwards) == done < 20
    del stream
    gc.collect()
    assert [cache() for cache in caches] == [None], "the cache of the closed stream is still there"


def test_an_event_stops_a_chains_stream(endless: Any, forwards: list[int]) -> None:
    """LangChain reads the model to its end when such a stream is closed, so closing alone would take 500 tokens."""
    cancel = threading.Event()
    chain = ChatPromptTemplate.from_template("{x}") | endless | StrOutputParser()
    stream = chain.stream({"x": "Hi"}, {"configurable": {"prophetkv_cancel": cancel}})
    for _ in range(3):
        next(stream)
    done = len(forwards)
    cancel.set()
    stream.close()
    assert len(forwards) <= done + 2


def test_an_event_stops_a_call(endless_engine: ProphetKVEngine, forwards: list[int]) -> None:
    model, cancel = ChatProphetKV(engine=endless_engine, max_tokens=500), threading.Event()
    with at_forward(endless_engine.model.model, 6, cancel.set):
        message = model.invoke("Hi", cancel=cancel)
    assert len(forwards) == 6, "the model did not run once more"
    assert message.response_metadata["finish_reason"] == "cancelled"
    assert 0 < message.usage_metadata["output_tokens"] <= 6


@pytest.mark.parametrize("style", ["ainvoke", "astream", "aclose"])
async def test_leaving_early_stops_the_generation(style: str, endless: Any, forwards: list[int]) -> None:
    if style == "aclose":
        stream = endless.astream("Hi")
        await anext(stream)
        await stream.aclose()
    else:
        task = asyncio.create_task(endless.ainvoke("Hi") if style == "ainvoke" else drain(endless.astream("Hi")))
        with cancelled_at(3, endless.engine, task), pytest.raises(asyncio.CancelledError):
            await task
    await until(lambda: stream_threads() == [])  # the step that was running may end
    assert 0 < len(forwards) <= 3
    assert await endless.ainvoke("Hi", max_tokens=1), "the engine is free again"


async def test_a_cancelled_call_in_the_queue_never_runs(
    endless: Any, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = stop_the_clock(monkeypatch)
    with endless.engine.model_lock:
        task = asyncio.create_task(endless.ainvoke("Hi"))
        await asyncio.to_thread(clock.wait_until_asked, 8)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: stream_threads() == [])  # it gives up while somebody else still has the model
    assert forwards == []


def test_an_answer_ends_at_its_deadline(endless_engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = ChatProphetKV(engine=endless_engine, max_tokens=2000, timeout=60), stop_the_clock(monkeypatch)
    with at_forward(endless_engine.model.model, 5, clock.pass_all_deadlines):
        message = model.invoke("Hi")
    assert message.response_metadata["finish_reason"] == "deadline"
    assert message.response_metadata["normalized_finish_reason"] == "other"
    assert 0 < message.usage_metadata["output_tokens"] <= 5
    with pytest.raises(DeadlineError):
        model.invoke("Hi", timeout=0)


async def test_many_tasks_at_once_get_their_own_answers(chat_engine: ProphetKVEngine) -> None:
    model = ChatProphetKV(engine=chat_engine, max_tokens=5)
    prompts = [f"Number {i} is" for i in range(8)]
    alone = [model.invoke(prompt).text for prompt in prompts]
    assert [message.text for message in await model.abatch(prompts)] == alone
    assert [message.text for message in model.batch(prompts)] == alone
