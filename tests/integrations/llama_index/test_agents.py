"""Agents of six steps: each step prefills what the last one said and what its tool found, counted in tokens."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.tools import FunctionTool

from prophetkv_rag.integrations.llama_index import ProphetKVLLM
from tests.integrations.langchain.rag import TOWN
from tests.integrations.scripted_engine import ScriptedEngine, check_steps
from tests.integrations.taught import CALL

AGENTS = ["ReActAgent", "FunctionAgent", "AgentWorkflow"]
QUESTION = "When do the places of the town open, and when do they close?"
PLACES = ["museum", "library", "harbour", "market", "station"]


def search_town(query: str) -> str:
    """Search the town's guide."""
    return f"{TOWN[PLACES.index(query) % len(TOWN)]}"


def react_words() -> list[str]:
    uses = [
        f"Thought: I need to look up the {place}.\nAction: search_town\nAction Input: {json.dumps({'query': place})}"
        for place in PLACES
    ]
    return [*uses, "Thought: I can answer without using any more tools.\nAnswer: At ten."]


def call_words() -> list[str]:
    return [*("I look.\n" + CALL % ("search_town", json.dumps({"query": place})) for place in PLACES), "At ten."]


def make_agent(kind: str, engine: ScriptedEngine) -> Any:
    llm = ProphetKVLLM(engine=engine, max_new_tokens=60)
    tools = [FunctionTool.from_defaults(search_town)]
    if kind == "ReActAgent":
        return ReActAgent(tools=tools, llm=llm)
    agent = FunctionAgent(tools=tools, llm=llm)
    return AgentWorkflow(agents=[agent], root_agent=agent.name) if kind == "AgentWorkflow" else agent


@pytest.mark.parametrize("kind", AGENTS)
def test_six_steps_prefill_what_is_new(kind: str) -> None:
    engine = ScriptedEngine(react_words() if kind == "ReActAgent" else call_words())
    engine.add_chunks(TOWN)
    agent = make_agent(kind, engine)

    async def talk() -> Any:
        return await agent.run(QUESTION)

    assert "At ten." in str(asyncio.run(talk()))
    check_steps(engine)
    chunks = [len(report.chunks) for report in engine.reports]
    assert chunks[0] == 0 < chunks[1]
    assert chunks == sorted(chunks)
