"""LangChain's message histories on an engine that remembers: what each turn computes, counted in rows of the model."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables.history import RunnableWithMessageHistory

from prophetkv_rag.integrations.langchain import ChatProphetKV
from tests.conversations.chats import counted_rows
from tests.integrations.conftest import make_engine
from tests.integrations.langchain.rag import TOWN, CallLog, town_store
from tests.integrations.rag import QUESTION

QUESTIONS = [QUESTION, "And when does the harbour of Marsala close?", "How many tanks shall the factory produce?"]
PROMPT = ChatPromptTemplate.from_messages([("system", "Be brief."), ("placeholder", "{history}"), ("human", "{input}")])
RAG_PROMPT = ChatPromptTemplate.from_messages(
    [("placeholder", "{history}"), ("human", "Context:\n\n{context}\n\nAnswer: {input}")]
)


def test_a_message_history_computes_what_is_new() -> None:
    engine = make_engine(remember=True)
    log, history = CallLog(), InMemoryChatMessageHistory()
    chain = RunnableWithMessageHistory(
        PROMPT | ChatProphetKV(engine=engine, max_tokens=8),
        lambda _: history,
        input_messages_key="input",
        history_messages_key="history",
    )
    with counted_rows(engine) as rows:
        answers = [
            chain.invoke({"input": question}, {"configurable": {"session_id": "1"}, "callbacks": [log]})
            for question in QUESTIONS
        ]
    assert len(history.messages) == 6
    assert log.reports[0]["remembered_tokens"] == 0
    for before, report, answer in zip(log.reports, log.reports[1:], answers[1:], strict=False):
        assert report["fresh_tokens"] < 60
        assert report["remembered_tokens"] >= before["prompt_tokens"]
        assert report["prompt_tokens"] == report["remembered_tokens"] + report["fresh_tokens"]
        assert report["fresh_tokens"] in rows
        details: Any = answer.usage_metadata["input_token_details"]
        assert details["cache_read"] == details["remembered"] == report["remembered_tokens"]


def test_with_the_context_behind_the_history_only_the_last_turn_is_computed_again() -> None:
    """As examples/chatbot_langchain does: the history holds bare questions, each turn's chunks follow it."""
    engine = make_engine(remember=True)
    model, store = ChatProphetKV(engine=engine, max_tokens=8), town_store(engine)
    history: list[Any] = []
    for number, question in enumerate(QUESTIONS):
        context = "\n\n".join(TOWN[number : number + 2])
        answer = (RAG_PROMPT | model).invoke({"history": history, "context": context, "input": question})
        report = answer.response_metadata["prophetkv"]
        new = "".join([question, *[message.text for message in history[-2:]]])
        before = "".join(message.text for message in history[:-2])
        assert report["fresh_tokens"] < len(engine.tokenizer(new)["input_ids"]) + 60
        assert report["remembered_tokens"] >= len(engine.tokenizer(before)["input_ids"])
        # Loaded as ever; the first one's own cache is made when a prompt first has it first.
        assert {chunk["status"] for chunk in report["chunks"]} <= {"hit", "miss"}
        history += [HumanMessage(question), AIMessage(answer.text)]
    assert store.engine.conversations.stats().tokens > 0


def test_tenants_of_one_engine_and_switching_off() -> None:
    engine = make_engine(remember=True)
    messages = [HumanMessage(QUESTION)]
    calls: list[dict[str, Any]] = [
        {"tenant": "a"},
        {"tenant": "b"},
        {"tenant": "a"},
        {"tenant": "a", "remember": False},
    ]
    found = [
        ChatProphetKV(engine=engine, max_tokens=4, **call)
        .invoke(messages)
        .response_metadata["prophetkv"]["remembered_tokens"]
        for call in calls
    ]
    assert found[0] == found[1] == found[3] == 0 < found[2]


def test_a_history_behind_context_that_changes_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The context stands in the system message: of other chunks the history is found behind them all the same."""
    monkeypatch.setattr("prophetkv_rag.reuse.continuing.RECENT", 0)  # so short a one would be computed
    engine = make_engine(remember=True)
    model = ChatProphetKV(engine=engine, max_tokens=8)
    town_store(engine)
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Context:\n\n{context}"), ("placeholder", "{history}"), ("human", "{input}")]
    )
    history: list[Any] = []
    for number, question in enumerate(QUESTIONS):
        context = "\n\n".join(TOWN[number : number + 2])
        answer = (prompt | model).invoke({"history": history, "context": context, "input": question})
        report = answer.response_metadata["prophetkv"]
        told = "".join(message.text for message in history)
        assert report["fresh_tokens"] < 60
        assert report["moved_tokens"] >= len(engine.tokenizer(told)["input_ids"])
        assert (report["moved_tokens"] > 0) == (number > 0)
        history += [HumanMessage(question), AIMessage("Well then: " + question)]
