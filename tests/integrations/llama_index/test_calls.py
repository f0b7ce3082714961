"""What a call carries and when it stops: report events, structured answers, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import Field
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.dispatcher import instrument_tags
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMChatInProgressEvent
from llama_index.core.memory import ChatMemoryBuffer

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import DeadlineError
from prophetkv_rag.integrations.llama_index import ProphetKVLLM, ReuseReportEvent
from tests.clock import at_forward, stop_the_clock
from tests.integrations.conftest import stream_threads, until
from tests.integrations.llama_index.reuse_table import Opening
from tests.integrations.rag import QUESTION, TEXTS, CallLog, build_index
from tests.integrations.scripted import ScriptedLLM


class Order(BaseEventHandler):
    """Keeps the events of model calls in order."""

    events: list[Any] = Field(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, (ReuseReportEvent, LLMChatEndEvent, LLMChatInProgressEvent)):
            self.events.append(event)

    @property
    def reports(self) -> list[ReuseReportEvent]:
        return [event for event in self.events if isinstance(event, ReuseReportEvent)]


@pytest.fixture
def order() -> Iterator[Order]:
    order = Order()
    root = get_dispatcher()
    root.add_event_handler(order)
    yield order
    root.event_handlers.remove(order)


@pytest.fixture
def endless(fresh_engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch) -> ProphetKVLLM:
    """A model whose answers never end by themselves, and whose every pass takes a while."""
    monkeypatch.setattr(fresh_engine.model.generation_config, "eos_token_id", None)
    fresh_engine.tokenizer.eos_token = None
    return ProphetKVLLM(engine=ProphetKVEngine(fresh_engine.model, fresh_engine.tokenizer), max_new_tokens=2000)


def call(llm: ProphetKVLLM, style: str) -> Any:
    messages = [ChatMessage(content=TEXTS[0] + "\n\n" + QUESTION)]
    if style == "stream_chat":
        return llm.stream_chat(messages)
    if style == "achat":
        return asyncio.run(llm.achat(messages))
    return llm.chat(messages)


@pytest.mark.parametrize("style", ["chat", "stream_chat", "achat"])
def test_one_report_event_a_call_with_its_tags(
    style: str, fresh_engine: ProphetKVEngine, llm: ProphetKVLLM, order: Order
) -> None:
    fresh_engine.add_chunks([TEXTS[0]])
    llm = ProphetKVLLM(engine=fresh_engine, max_new_tokens=6, model_name="tiny")
    with instrument_tags({"request": 7}):
        found = call(llm, style)
    if style == "stream_chat":
        with instrument_tags({"request": 8}):  # a stream is read elsewhere; the report is the call's all the same
            list(found)
    (event,) = order.reports
    assert order.events[0] is event, "before the first token"
    assert (event.model_name, event.tags) == ("tiny", {"request": 7})
    assert event.report == llm.last_report.to_dict()
    assert [chunk["status"] for chunk in event.report["chunks"]] == ["hit"]
    assert json.loads(json.dumps(event.report)) == event.report
    assert event.class_name() == "ReuseReportEvent"
    assert event.span_id == order.events[-1].span_id


def test_no_event_holds_a_tensor(llm: ProphetKVLLM, order: Order) -> None:
    list(call(llm, "stream_chat"))
    for event in order.events:
        json.dumps(event.report if isinstance(event, ReuseReportEvent) else event.response.raw)


QA = PromptTemplate("Context:\n{context_str}\nQuestion: {query_str}")


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
@pytest.mark.parametrize("style", ["sync", "async", "stream", "astream", "structured_llm"])
def test_structured_answers_know_the_question(
    style: str,
    chat: bool,
    chat_engine: ProphetKVEngine,
    completion_engine: ProphetKVEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = chat_engine if chat else completion_engine
    queries = []
    real = engine._reader.read
    monkeypatch.setattr(
        engine._reader, "read", lambda prompt, *, query: queries.append(query) or real(prompt, query=query)
    )
    llm = ScriptedLLM(engine=engine)
    variables = {"context_str": '{"json": "in a chunk {x}"}', "query_str": QUESTION}

    async def drain() -> Any:
        return [part async for part in await llm.astream_structured_predict(Opening, QA, **variables)][-1]

    answer = {
        "sync": lambda: llm.structured_predict(Opening, QA, **variables),
        "async": lambda: asyncio.run(llm.astructured_predict(Opening, QA, **variables)),
        "stream": lambda: list(llm.stream_structured_predict(Opening, QA, **variables))[-1],
        "astream": lambda: asyncio.run(drain()),
        "structured_llm": lambda: llm.as_structured_llm(Opening).chat([ChatMessage(content="Hi")]).raw,
    }[style]()
    assert answer.model_dump() == {"place": "museum", "opens_at": "ten"}
    if style != "structured_llm":
        assert queries == [QUESTION]


def test_structured_query_engine_reuses_and_parses(
    fresh_engine: ProphetKVEngine, new_vector_store: Any, call_log: CallLog
) -> None:
    index = build_index(new_vector_store(fresh_engine))
    engine = index.as_query_engine(llm=ScriptedLLM(engine=fresh_engine), output_cls=Opening, similarity_top_k=4)
    assert engine.query(QUESTION).response == Opening(place="museum", opens_at="ten")
    assert [chunk["status"] for chunk in call_log.chunks] == ["hit"] * 4


def test_an_answer_that_does_not_follow_the_schema_is_an_error(llm: ProphetKVLLM) -> None:
    with pytest.raises(ValueError, match="json"):
        llm.structured_predict(Opening, QA, context_str="c", query_str="q")


def test_a_deadline_ends_the_answer(endless: ProphetKVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = stop_the_clock(monkeypatch), endless.engine.model.model
    timed = endless.model_copy(update={"deadline_s": 60})
    with at_forward(model, 5, clock.pass_all_deadlines):
        response = timed.complete("Tell me everything.")
    assert response.raw["finish_reason"] == "deadline"
    assert 0 < response.raw["usage"]["completion_tokens"] <= 5
    with at_forward(model, 5, clock.pass_all_deadlines):
        assert list(timed.stream_complete("Tell me everything."))[-1].raw["finish_reason"] == "deadline"
    assert endless.complete("Hi", max_new_tokens=3, deadline_s=60).raw["finish_reason"] == "length"
    with pytest.raises(DeadlineError):
        endless.complete("Hi", deadline_s=0)
    with pytest.raises(DeadlineError):
        asyncio.run(endless.acomplete("Hi", deadline_s=0))


def test_cancelled_by_stops_a_chat_engine_that_nobody_reads(
    endless: ProphetKVLLM, new_vector_store: Any, order: Order
) -> None:
    index = build_index(new_vector_store(endless.engine))
    event = threading.Event()
    memory = ChatMemoryBuffer.from_defaults(token_limit=3000)
    chat = index.as_chat_engine(chat_mode="context", llm=endless.cancelled_by(event), memory=memory)
    with at_forward(endless.engine.model.model, 30, lambda: event.wait(300)):  # nobody reads on; it must not run away
        tokens = iter(chat.stream_chat(QUESTION).response_gen)
        next(tokens)
        event.set()
        list(tokens)
    (end,) = [event for event in order.events if isinstance(event, LLMChatEndEvent)]
    assert end.response.raw["finish_reason"] == "cancelled"
    assert end.response.raw["usage"]["completion_tokens"] < 2000
    assert endless.complete("Hi", max_new_tokens=1).raw["finish_reason"] == "length", "only the copy is cancelled"


async def test_a_cancelled_task_that_waits_for_the_model_lets_go(
    endless: ProphetKVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, clock = endless.engine.model_lock, stop_the_clock(monkeypatch)
    lock.acquire()
    try:
        task = asyncio.create_task(endless.acomplete("Hi"))
        await asyncio.to_thread(clock.wait_until_asked, 8)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: stream_threads() == [])  # though the model is not free
    finally:
        lock.release()
