"""Ten turns through each chat engine and agent: tokens computed, call by call."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.chat_engine import CondensePlusContextChatEngine, CondenseQuestionChatEngine, ContextChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context

from prophetkv_rag.integrations.llama_index import ProphetKVLLM
from tests.integrations.llama_index.test_conversations import InOrder
from tests.integrations.rag import TEXTS, build_index
from tests.integrations.taught import CALL
from tests.integrations.ten_turns import ANSWERS, QUESTIONS, TURNS, CountedEngine, check_flat, check_turns

SAME, CHANGING = len(TEXTS), 1
"""How many chunks are retrieved: all, so that every turn's context is the same, or the nearest one."""
PLACES = ["harbour of Marsala", "museum opens", "factory planes", "quick brown fox"]


def memory() -> ChatMemoryBuffer:
    return ChatMemoryBuffer.from_defaults(token_limit=6000)


def asked(number: int) -> str:
    """A question that finds another chunk every turn."""
    return f"{QUESTIONS[number]} Say it of the {PLACES[number % len(PLACES)]}."


def talk(kind: Any, engine: CountedEngine, vector_store: Any, top_k: int) -> None:
    """Ten turns with a chat engine that puts what it retrieves before the history."""
    chat = kind.from_defaults(
        retriever=build_index(vector_store).as_retriever(similarity_top_k=top_k),
        llm=ProphetKVLLM(engine=engine),
        memory=memory(),
        node_postprocessors=[InOrder()],
    )
    for number in range(TURNS):
        chat.chat(asked(number))
    check_turns(engine)


def two_calls_a_turn() -> list[str]:
    """What is said where each question but the first is rewritten before it is answered."""
    return [ANSWERS[0], *(words for number in range(1, TURNS) for words in (asked(number), ANSWERS[number]))]


@pytest.mark.parametrize("top_k", [SAME, CHANGING])
def test_context(top_k: int, new_vector_store: Any) -> None:
    engine = CountedEngine(ANSWERS)
    talk(ContextChatEngine, engine, new_vector_store(engine), top_k)
    check_flat(engine, range(TURNS), moves=top_k == CHANGING)


@pytest.mark.parametrize("top_k", [SAME, CHANGING])
def test_condense_plus_context(top_k: int, new_vector_store: Any) -> None:
    engine = CountedEngine(two_calls_a_turn())
    talk(CondensePlusContextChatEngine, engine, new_vector_store(engine), top_k)
    check_flat(engine, range(0, 2 * TURNS, 2), moves=top_k == CHANGING)
    check_flat(engine, range(1, 2 * TURNS - 1, 2))  # what rewrites the question goes on from its own history


def test_condense_question(new_vector_store: Any) -> None:
    """The query engine's prompts hold no history, so they do not grow; the others go on from each other."""
    engine = CountedEngine(two_calls_a_turn())
    llm = ProphetKVLLM(engine=engine)
    query_engine = build_index(new_vector_store(engine)).as_query_engine(llm=llm, similarity_top_k=CHANGING)
    chat = CondenseQuestionChatEngine.from_defaults(query_engine=query_engine, llm=llm, memory=memory())
    for number in range(TURNS):
        chat.chat(asked(number))
    check_turns(engine)
    check_flat(engine, range(0, 2 * TURNS, 2))
    check_flat(engine, range(1, 2 * TURNS - 1, 2))


def use_of(kind: str, number: int) -> list[str]:
    arguments = json.dumps({"number": number})
    if kind == "ReActAgent":
        use = f"Thought: I need to look up {number}.\nAction: search_town\nAction Input: {arguments}"
        return [use, f"Thought: I can answer without using any more tools.\nAnswer: {ANSWERS[number]}"]
    return [CALL % ("search_town", arguments), ANSWERS[number]]


@pytest.mark.parametrize("kind", ["ReActAgent", "FunctionAgent", "AgentWorkflow"])
def test_agents(kind: str) -> None:
    def search_town(number: int) -> str:
        """Search the town's guide."""
        return TEXTS[number % len(TEXTS)]

    engine = CountedEngine([words for number in range(TURNS) for words in use_of(kind, number)])
    engine.add_chunks(TEXTS)
    tools, llm = [FunctionTool.from_defaults(search_town)], ProphetKVLLM(engine=engine)
    agent: Any = (ReActAgent if kind == "ReActAgent" else FunctionAgent)(tools=tools, llm=llm)
    if kind == "AgentWorkflow":
        agent = AgentWorkflow(agents=[agent], root_agent=agent.name)

    async def ask_all() -> None:
        context, kept = Context(agent), memory()
        for question in QUESTIONS:
            await agent.run(question, ctx=context, memory=kept)

    asyncio.run(ask_all())
    check_turns(engine)
    check_flat(engine, range(0, 2 * TURNS, 2))
    check_flat(engine, range(1, 2 * TURNS, 2))
    assert len(engine.reports[-1].chunks) >= len(TEXTS)
