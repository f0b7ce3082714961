"""`create_agent` over six steps: each prefills what the last one said and what its tool found, counted in tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import create_retriever_tool
from langgraph.checkpoint.memory import InMemorySaver

from prophetkv_rag.integrations.langchain import ChatProphetKV
from tests.integrations.langchain.rag import TOWN, town_store
from tests.integrations.scripted_engine import ScriptedEngine, check_steps
from tests.integrations.taught import CALL, TOOL_TEMPLATE, tool_tokenizer

PLACES = ["museum", "library", "harbour", "market", "station"]
QUESTION = "When do the places of the town open, and when do they close?"
AS_JSON = TOOL_TEMPLATE.replace(
    "{{ message.content }}",
    "{% if message.role == 'tool' %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}",
)
"""Prints what a tool found as JSON, as Llama 3.x does: a text with a line break is then no chunk's."""


def words() -> list[str]:
    calls = ["I look.\n" + CALL % ("search_town", json.dumps({"query": f"the {place}"})) for place in PLACES]
    return [*calls, "At ten."]


def make_agent(engine: ScriptedEngine, **options: Any) -> Any:
    retriever = town_store(engine).as_retriever(search_kwargs={"k": 2})
    search = create_retriever_tool(retriever, "search_town", "Search texts about the town.")
    return create_agent(ChatProphetKV(engine=engine, max_tokens=60), tools=[search], **options)


@pytest.mark.parametrize("template", [TOOL_TEMPLATE, AS_JSON], ids=["as it is", "as JSON"])
def test_six_steps_prefill_what_is_new(template: str) -> None:
    """Printed as JSON, too: what was not found as a chunk is computed when it comes, and never again."""
    assert template.count("tojson") == 1 + (template is AS_JSON)
    tokenizer = tool_tokenizer()
    tokenizer.chat_template = template
    engine = ScriptedEngine(words(), tokenizer)
    answer = make_agent(engine).invoke({"messages": [HumanMessage(QUESTION)]})
    assert answer["messages"][-1].text == "At ten."
    assert len(answer["messages"]) == 12
    check_steps(engine)
    chunks = [len(report.chunks) for report in engine.reports]
    assert chunks[0] == 0
    assert chunks == sorted(chunks)
    assert (chunks[-1] == 10) == (template is TOOL_TEMPLATE)  # two a call; those without line breaks are found in both
    assert chunks[-1] > 0
    assert len(TOWN) == 4


def test_a_checkpointer_goes_on_after_the_agents_turn() -> None:
    engine = ScriptedEngine([*words()[:1], "At ten.", *words()[1:2], "At nine."])
    agent = make_agent(engine, checkpointer=InMemorySaver())
    thread: Any = {"configurable": {"thread_id": "1"}}
    for question in (QUESTION, "And the library?"):
        agent.invoke({"messages": [HumanMessage(question)]}, thread)
    check_steps(engine)
    assert engine.reports[2].fresh_tokens < 60 < engine.reports[2].remembered_tokens
