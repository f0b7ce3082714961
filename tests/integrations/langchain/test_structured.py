"""Structured output: whole or an error, by schema, by tool or by JSON mode, and beside tools."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, HumanMessage
from pydantic import BaseModel
from typing_extensions import TypedDict

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain import ChatProphetKV, RetrievalMiddleware
from tests.integrations.langchain.rag import TOWN, town_store
from tests.integrations.taught import CATS, TOWN_QUESTION, WEATHER, as_tools, taught_engine


class Mood(BaseModel):
    mood: Literal["good", "bad"]
    stars: Literal[1, 2, 3]


class MoodDict(TypedDict):
    """How it is."""

    mood: Literal["good", "bad"]


@pytest.fixture
def model(chat_engine: ProphetKVEngine) -> ChatProphetKV:
    """Random weights that have never seen JSON; the template shows no tools."""
    return ChatProphetKV(engine=chat_engine, max_tokens=60, temperature=1.0)


def test_any_model_follows_a_schema(model: ChatProphetKV) -> None:
    assert not model.supports_tools
    assert isinstance(model.with_structured_output(Mood).invoke("Hi"), Mood)
    assert model.with_structured_output(MoodDict).invoke("Hi")["mood"] in ("good", "bad")
    assert Mood.model_validate(model.with_structured_output(Mood.model_json_schema()).invoke("Hi"))
    assert list(model.with_structured_output(MoodDict).stream("Hi"))[-1]["mood"] in ("good", "bad")


async def test_async_and_raw(model: ChatProphetKV) -> None:
    assert isinstance(await model.with_structured_output(Mood).ainvoke("Hi"), Mood)
    whole = await model.with_structured_output(Mood, include_raw=True).ainvoke("Hi")
    assert isinstance(whole["raw"], AIMessage)
    assert isinstance(whole["parsed"], Mood)
    assert whole["parsing_error"] is None
    assert whole["raw"].response_metadata["finish_reason"] == "stop"


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
@pytest.mark.parametrize("schema", [Mood, MoodDict])
def test_half_an_answer_is_an_error(schema: Any, method: str) -> None:
    """LangChain's parsers would take `{"mood": "go` for a whole answer."""
    model = ChatProphetKV(engine=taught_engine())
    chain = model.with_structured_output(schema, method=method, max_tokens=6)
    with pytest.raises(OutputParserException, match=r"cut off .finish reason 'length'.*raise max_tokens"):
        chain.invoke(CATS)
    with pytest.raises(OutputParserException, match="cut off"):
        list(chain.stream(CATS))
    raw = model.with_structured_output(schema, method=method, max_tokens=6, include_raw=True).invoke(CATS)
    assert raw["parsed"] is None
    assert isinstance(raw["parsing_error"], OutputParserException)


def test_half_a_call_is_no_call() -> None:
    model = ChatProphetKV(engine=taught_engine(), max_tokens=46)
    bound = model.bind_tools(as_tools(WEATHER), tool_choice="any")
    question = "What is the weather in San Francisco, CA?"
    streamed: Any = None
    for chunk in bound.stream(question):
        streamed = chunk if streamed is None else streamed + chunk
    for message in (bound.invoke(question), streamed):
        assert message.response_metadata["finish_reason"] == "length"
        assert message.response_metadata["normalized_finish_reason"] == "length"
        assert message.tool_calls == message.invalid_tool_calls == []
        cut = message.response_metadata["cut_off_tool_call"]
        assert cut["name"] == "get_weather"
        assert cut["args"].startswith('{"loc')
    with pytest.raises(OutputParserException, match="cut off"):
        model.with_structured_output(as_tools({"Joke": ("setup",)})[0]).invoke(CATS)


def test_retrieved_chunks_are_reused(chat_engine: ProphetKVEngine) -> None:
    store = town_store(chat_engine)
    model = ChatProphetKV(engine=store.engine, max_tokens=60)
    prompt = [HumanMessage("\n\n".join(TOWN) + f"\n\n{TOWN_QUESTION}")]
    raw = model.with_structured_output(Mood, include_raw=True).invoke(prompt)["raw"]
    report = raw.response_metadata["prophetkv"]
    assert [chunk["status"] for chunk in report["chunks"]] == ["hit"] * len(TOWN)
    assert report["reused_tokens"] == model.invoke(prompt, max_tokens=1).response_metadata["prophetkv"]["reused_tokens"]


def test_a_bound_response_format(model: ChatProphetKV) -> None:
    """As `ChatOpenAI` takes it, and as agents bind it."""
    schema = {"type": "json_schema", "json_schema": {"name": "Mood", "schema": Mood.model_json_schema()}}
    assert Mood.model_validate_json(model.bind(response_format=schema).invoke("Hi").text)
    with pytest.raises(InputError, match="response_format is"):
        model.bind(response_format={"type": "xml"}).invoke("Hi")


def test_an_agent_with_a_response_format(model: ChatProphetKV) -> None:
    """As LangChain's agents ask providers for it, retrieval in front."""
    store = town_store(model.engine)
    middleware = [RetrievalMiddleware(store.as_retriever())]
    for response_format in (Mood, ProviderStrategy(Mood)):
        agent = create_agent(model, middleware=middleware, response_format=response_format)
        state = agent.invoke({"messages": [HumanMessage(TOWN_QUESTION)]})
        assert isinstance(state["structured_response"], Mood)
    report = state["messages"][-1].response_metadata["prophetkv"]
    assert [chunk["status"] for chunk in report["chunks"]] == ["hit"] * len(TOWN)
    assert [message.type for message in state["messages"]] == ["human", "ai"], "nothing retrieved stays"


def test_the_middleware_keeps_the_agents_own_prompt(model: ChatProphetKV) -> None:
    store = town_store(model.engine)
    with pytest.raises(InputError, match="give a LangChain retriever"):
        RetrievalMiddleware(store)
    prompts: list[str] = []

    class Log(BaseCallbackHandler):
        def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
            prompts.extend(message.text for batch in messages for message in batch)

    middleware = RetrievalMiddleware(store.as_retriever(search_kwargs={"k": 1}), instruction="Read:")
    agent = create_agent(model.model_copy(update={"max_tokens": 2}), system_prompt="Be brief.", middleware=[middleware])
    agent.invoke({"messages": [HumanMessage("When does the museum open?")]}, {"callbacks": [Log()]})
    found = store.as_retriever(search_kwargs={"k": 1}).invoke("When does the museum open?")[0].page_content
    assert prompts == [f"Be brief.\n\nRead:\n\n{found}", "When does the museum open?"]


def test_bad_requests(model: ChatProphetKV) -> None:
    with pytest.raises(InputError, match="allowed: json_schema, function_calling, json_mode"):
        model.with_structured_output(Mood, method="yaml")
    with pytest.raises(InputError, match="needs a schema"):
        model.with_structured_output(None, method="json_schema")
    with pytest.raises(InputError, match="uniqueItems"):
        model.with_structured_output({"title": "T", "type": "array", "uniqueItems": True}).invoke("Hi")
