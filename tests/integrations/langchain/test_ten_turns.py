"""Ten turns through each chain and agent with a history: tokens computed, call by call."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_classic.chains import ConversationalRetrievalChain, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from prophetkv_rag.integrations.langchain import ChatProphetKV, RetrievalMiddleware
from tests.integrations.langchain.chains import HISTORY_PROMPT
from tests.integrations.langchain.rag import town_store
from tests.integrations.rag import TEXTS
from tests.integrations.taught import CALL
from tests.integrations.ten_turns import ANSWERS, QUESTIONS, TURNS, CountedEngine, check_flat, check_turns

THREAD: Any = {"configurable": {"thread_id": "1", "session_id": "1"}}
PLACES = ["harbour of Marsala", "museum opens", "factory planes", "quick brown fox"]
ASKED = [f"{question} Say it of the {PLACES[number % 4]}." for number, question in enumerate(QUESTIONS)]
"""Each finds another text than the one before."""

Ask = Callable[[str], Any]


def model_of(engine: CountedEngine) -> ChatProphetKV:
    return ChatProphetKV(engine=engine, max_tokens=8)


def nearest(engine: CountedEngine) -> Any:
    return town_store(engine).as_retriever(search_kwargs={"k": 1})


def with_history(chain: Any, **keys: str) -> Any:
    history = InMemoryChatMessageHistory()
    return RunnableWithMessageHistory(chain, lambda _: history, input_messages_key="input", **keys)


def one_context(engine: CountedEngine) -> Ask:
    town_store(engine)
    prompt = ChatPromptTemplate.from_messages([("placeholder", "{history}"), ("human", "{input}")])
    chain = with_history(prompt | model_of(engine), history_messages_key="history")
    context = "Context:\n\n" + "\n\n".join(TEXTS) + "\n\n"
    return lambda asked: chain.invoke({"input": context + asked if asked == ASKED[0] else asked}, THREAD)


def retrieval_chain(engine: CountedEngine) -> Ask:
    stuff = create_stuff_documents_chain(model_of(engine), HISTORY_PROMPT)
    chain = with_history(
        create_retrieval_chain(nearest(engine), stuff),
        history_messages_key="chat_history",
        output_messages_key="answer",
    )
    return lambda asked: chain.invoke({"input": asked}, THREAD)


def retrieval_agent(engine: CountedEngine) -> Ask:
    middleware = [RetrievalMiddleware(nearest(engine))]
    agent = create_agent(model_of(engine), middleware=middleware, checkpointer=InMemorySaver())
    return lambda asked: agent.invoke({"messages": [("user", asked)]}, THREAD)


def history_first(engine: CountedEngine) -> Ask:
    """As examples/chatbot_langchain."""
    human = "Context:\n\n{context}\n\nAnswer from the context: {question}"
    prompt = ChatPromptTemplate.from_messages([("placeholder", "{history}"), ("human", human)])
    chain, history, retriever = prompt | model_of(engine), list[Any](), nearest(engine)

    def ask(asked: str) -> None:
        context = "\n\n".join(found.page_content for found in retriever.invoke(asked))
        answer = chain.invoke({"context": context, "history": history, "question": asked})
        history.extend([HumanMessage(asked), AIMessage(answer.text)])

    return ask


@pytest.mark.parametrize("make", [one_context, retrieval_chain, retrieval_agent, history_first])
def test_one_call_a_turn(make: Callable[[CountedEngine], Ask]) -> None:
    engine = CountedEngine(ANSWERS)
    ask = make(engine)
    for asked in ASKED:
        ask(asked)
    check_turns(engine)
    check_flat(engine, range(TURNS), moves=make in (retrieval_chain, retrieval_agent))


def test_conversational_retrieval_chain() -> None:
    """Its answers' prompts hold no history; those that rewrite the question go on from each other."""
    words = [ANSWERS[0]]
    for number in range(1, TURNS):
        words += [ASKED[number], ANSWERS[number]]
    engine = CountedEngine(words)
    chain = ConversationalRetrievalChain.from_llm(model_of(engine), nearest(engine))
    history = list[tuple[str, str]]()
    for asked in ASKED:
        history.append((asked, chain.invoke({"question": asked, "chat_history": history})["answer"]))
    check_turns(engine)
    check_flat(engine, range(0, 2 * TURNS, 2))
    check_flat(engine, range(1, 2 * TURNS - 1, 2))


def test_an_agent_with_a_tool() -> None:
    @tool
    def search_town(number: int) -> str:
        """Search the town's guide."""
        return TEXTS[number % len(TEXTS)]

    calls = [CALL % ("search_town", json.dumps({"number": number})) for number in range(TURNS)]
    engine = CountedEngine([words for pair in zip(calls, ANSWERS, strict=True) for words in pair])
    engine.add_chunks(TEXTS)
    agent = create_agent(model_of(engine), tools=[search_town], checkpointer=InMemorySaver())
    for question in QUESTIONS:
        agent.invoke({"messages": [("user", question)]}, THREAD)
    check_turns(engine)
    check_flat(engine, range(0, 2 * TURNS, 2))
    check_flat(engine, range(1, 2 * TURNS, 2))
    assert len(engine.reports[-1].chunks) >= len(TEXTS)
