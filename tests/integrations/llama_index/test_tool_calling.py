"""Function-calling agents on a model that was taught to call, and structured output from one that knows nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import pytest
from llama_index.core.agent.workflow import AgentStream, AgentWorkflow, FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.llama_index import CallRefusedError, ProphetKVLLM
from tests.integrations.langchain.rag import TOWN
from tests.integrations.rag import CallLog, build_index
from tests.integrations.taught import CATS, TOWN_QUESTION, taught_engine

WEATHER_QUESTION = "What is the weather in San Francisco, CA?"


def search_town(query: str) -> str:
    """Search the town's guide."""
    return f"{TOWN[1]}\n\n{TOWN[0]}" if query == "museum" else "Nothing."


def get_weather(location: str) -> str:
    """Get the weather."""
    return f"Sun in {location}."


class Mood(BaseModel):
    mood: Literal["good", "bad"]
    stars: Literal[1, 2, 3]


class Joke(BaseModel):
    """Joke to tell user."""

    setup: str
    punchline: str


PROMPT = PromptTemplate("How is it? {topic}")


@pytest.fixture
def taught() -> ProphetKVLLM:
    return ProphetKVLLM(engine=taught_engine(), max_new_tokens=60)


def tool(function: Callable[..., Any]) -> FunctionTool:
    return FunctionTool.from_defaults(function)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("workflow", [True, False])
def test_an_agent_calls_and_reuses_what_its_tool_found(
    workflow: bool, streaming: bool, taught: ProphetKVLLM, call_log: CallLog
) -> None:
    taught.engine.add_chunks(TOWN)
    agent = FunctionAgent(tools=[tool(search_town)], llm=taught, streaming=streaming)
    runner = AgentWorkflow(agents=[agent], root_agent=agent.name) if workflow else agent

    async def talk() -> tuple[list[Any], Any]:
        handler = runner.run(TOWN_QUESTION, max_iterations=3, early_stopping_method="generate")
        events = [event async for event in handler.stream_events()]
        return events, await handler

    events, _ = asyncio.run(talk())
    results = [event for event in events if isinstance(event, ToolCallResult)]
    assert (results[0].tool_name, results[0].tool_kwargs) == ("search_town", {"query": "museum"})
    assert results[0].tool_output.content.startswith(TOWN[1])
    assert [chunk["status"] for chunk in call_log.chunks[:2]] == ["hit", "hit"]
    if streaming:
        words = "".join(event.delta for event in events if isinstance(event, AgentStream))
        assert words.startswith("I look.")
        assert "<tool_call>" not in words[:30]


def test_predict_and_call(taught: ProphetKVLLM) -> None:
    assert isinstance(taught, FunctionCallingLLM)
    assert taught.metadata.is_function_calling_model
    assert taught.predict_and_call([tool(get_weather)], WEATHER_QUESTION).response == "Sun in SF."
    assert asyncio.run(taught.apredict_and_call([tool(get_weather)], WEATHER_QUESTION)).response == "Sun in SF."


def test_chats_with_tools(taught: ProphetKVLLM) -> None:
    tools = [tool(get_weather)]
    answer = taught.chat_with_tools(tools, WEATHER_QUESTION, tool_required=True)
    (block,) = [block for block in answer.message.blocks if isinstance(block, ToolCallBlock)]
    assert (block.tool_name, block.tool_kwargs) == ("get_weather", {"location": "SF"})
    assert answer.raw["finish_reason"] == "tool_calls"
    last = list(taught.stream_chat_with_tools(tools, WEATHER_QUESTION))[-1]
    assert [call.tool_kwargs for call in taught.get_tool_calls_from_response(last)] == [{"location": "SF"}]
    chosen = taught.chat_with_tools([tool(get_weather), tool(search_town)], "Hello!", tool_choice="search_town")
    assert [call.tool_name for call in taught.get_tool_calls_from_response(chosen)] in ([["search_town"], []])
    history = [ChatMessage(content=WEATHER_QUESTION), answer.message]
    history.append(ChatMessage(role="tool", content="Sun.", additional_kwargs={"tool_call_id": block.tool_call_id}))
    assert taught.chat_with_tools(tools, chat_history=history, max_new_tokens=3).message.role == "assistant"


def test_a_call_that_is_cut_off_is_none(taught: ProphetKVLLM) -> None:
    answer = taught.chat_with_tools([tool(get_weather)], WEATHER_QUESTION, tool_required=True, max_new_tokens=20)
    assert answer.raw["finish_reason"] == "length"
    with pytest.raises(ValueError, match=r"called no tool .finish reason 'length'"):
        taught.get_tool_calls_from_response(answer)
    assert taught.get_tool_calls_from_response(answer, error_on_no_tool_call=False) == []


@pytest.mark.parametrize("mode", [PydanticProgramMode.LLM, PydanticProgramMode.FUNCTION])
def test_structured_answers_by_schema_or_by_tool(mode: PydanticProgramMode, taught: ProphetKVLLM) -> None:
    llm = taught.model_copy(update={"pydantic_program_mode": mode, "max_new_tokens": 80})
    prompt = PromptTemplate(CATS)
    if mode == PydanticProgramMode.FUNCTION:
        assert llm.structured_predict(Joke, prompt) == Joke(setup="Cat?", punchline="Mat.")
    else:
        assert isinstance(llm.structured_predict(Mood, prompt), Mood)


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_structured_answers_follow_the_schema(
    chat: bool, chat_engine: ProphetKVEngine, completion_engine: ProphetKVEngine
) -> None:
    """From random weights, which have never seen JSON."""
    llm = ProphetKVLLM(engine=chat_engine if chat else completion_engine, max_new_tokens=60, temperature=1.0)

    async def drain() -> Any:
        return [part async for part in await llm.astream_structured_predict(Mood, PROMPT, topic="b")][-1]

    found = [
        llm.structured_predict(Mood, PROMPT, topic="a"),
        asyncio.run(llm.astructured_predict(Mood, PROMPT, topic="a")),
        list(llm.stream_structured_predict(Mood, PROMPT, topic="a"))[-1],
        asyncio.run(drain()),
        llm.as_structured_llm(Mood).complete("How is it?").raw,
        llm.as_structured_llm(Mood).chat([ChatMessage(content="How is it?")]).raw,
    ]
    for answer in found:
        Mood.model_validate(answer.model_dump())
    with pytest.raises(ValueError, match="json"):
        llm.structured_predict(Mood, PROMPT, topic="a", llm_kwargs={"max_new_tokens": 4})


def test_a_query_engine_follows_the_schema(
    fresh_engine: ProphetKVEngine, new_vector_store: Any, call_log: CallLog
) -> None:
    index = build_index(new_vector_store(fresh_engine))
    llm = ProphetKVLLM(engine=fresh_engine, max_new_tokens=60, temperature=1.0)
    answer = index.as_query_engine(llm=llm, output_cls=Mood, similarity_top_k=2).query("How is it?").response
    assert isinstance(answer, Mood)
    assert [chunk["status"] for chunk in call_log.chunks] == ["hit", "hit"]


def test_a_schema_that_cannot_be_kept_is_refused(llm: ProphetKVLLM) -> None:
    class Unique(BaseModel):
        words: set[str]

    with pytest.raises(CallRefusedError, match="uniqueItems"):
        llm.structured_predict(Unique, PROMPT, topic="a")


def test_templates_that_show_no_tools(llm: ProphetKVLLM) -> None:
    assert not llm.metadata.is_function_calling_model
    with pytest.raises(CallRefusedError, match="leaves tools out"):
        llm.chat_with_tools([tool(get_weather)], "Hi")
