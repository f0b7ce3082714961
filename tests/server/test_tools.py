"""Tools and structured output over HTTP, by the `openai` client's own helpers, on a model that was taught to call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from openai import LengthFinishReasonError, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from tests.integrations.taught import (
    CATS,
    HELLO,
    SAN_FRANCISCO,
    TOWN_QUESTION,
    TWO,
    WEATHER,
    Joke,
    as_tools,
    taught_engine,
)
from tests.server.running import CHUNKS, MODEL_NAME, Running, running


@pytest.fixture(scope="module")
def tool_server() -> Iterator[Running]:
    with running(taught_engine()) as found:
        yield found


@pytest.fixture
def client(tool_server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=tool_server.api, api_key="none", max_retries=0) as made:
        yield made


def ask(client: OpenAI, messages: Any = SAN_FRANCISCO, tools: Any = WEATHER, **more: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL_NAME, messages=messages, tools=as_tools(tools), max_tokens=more.pop("max_tokens", 80), **more
    )


def test_a_model_may_call(client: OpenAI) -> None:
    answer = ask(client)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"location": "SF"}
    assert answer.usage.completion_tokens > 10
    assert answer.prophetkv["finish_reason"] == "stop"


def test_words_and_a_call_in_a_stream(client: OpenAI) -> None:
    question = [{"role": "user", "content": TOWN_QUESTION}]
    tools = {"search_town": ("query",)}
    chunks = list(ask(client, question, tools, stream=True, stream_options={"include_usage": True}))
    *pieces, usage = chunks
    deltas = [piece.choices[0].delta for piece in pieces]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [(call.index, call.type, call.function.name) for call in calls[:1]] == [(0, "function", "search_town")]
    assert calls[0].id
    assert all((call.index, call.id, call.function.name) == (0, None, None) for call in calls[1:])
    assert not any({"name", "id"} & (call.model_fields_set | call.function.model_fields_set) for call in calls[1:])
    assert len(calls) > 3
    assert json.loads("".join(call.function.arguments for call in calls)) == {"query": "museum"}
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["tool_calls"]
    whole = ask(client, question, tools)
    assert whole.choices[0].message.content == "I look."
    assert usage.usage == whole.usage


def test_the_client_s_own_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL_NAME, messages=SAN_FRANCISCO, tools=as_tools(WEATHER), max_tokens=80
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert json.loads(final.choices[0].message.tool_calls[0].function.arguments) == {"location": "SF"}
    assert final.choices[0].finish_reason == "tool_calls"


def test_choices(client: OpenAI) -> None:
    def names(**more: Any) -> list[str]:
        return [call.function.name for call in ask(client, HELLO, TWO, **more).choices[0].message.tool_calls or ()]

    assert names(tool_choice="required") == ["get_weather"]
    assert names(tool_choice={"type": "function", "function": {"name": "magic_function"}}) == ["magic_function"]
    assert names(tool_choice="none", max_tokens=4) == []
    hidden = ask(client, HELLO, TWO, tool_choice="none", max_tokens=4)
    plain = client.chat.completions.create(model=MODEL_NAME, messages=HELLO, max_tokens=4)
    assert hidden.usage == plain.usage


def test_a_call_and_its_answer(client: OpenAI, tool_server: Running) -> None:
    """The whole round; what the tool found is registered, so it is reused."""
    with tool_server.client() as http:
        http.put("/v1/chunks", json={"chunks": CHUNKS[:2]}).raise_for_status()
    asked = [{"role": "user", "content": TOWN_QUESTION}]
    tools = {"search_town": ("query",)}
    said = ask(client, asked, tools).choices[0].message
    found = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "\n\n".join(CHUNKS[:2])}
    answer = ask(client, [*asked, said.model_dump(exclude_none=True), found], tools, max_tokens=4)
    assert [chunk["status"] for chunk in answer.prophetkv["chunks"]] == ["hit", "hit"]
    held = ask(client, [*asked, said.model_dump(exclude_none=True), found], tools, tool_choice="required", max_tokens=4)
    assert held.prophetkv["reused_tokens"] == answer.prophetkv["reused_tokens"]
    assert held.usage.prompt_tokens == answer.usage.prompt_tokens


def test_parse_with_a_pydantic_model(client: OpenAI) -> None:
    def parse(**more: Any) -> Any:
        messages = [{"role": "user", "content": CATS}]
        return client.chat.completions.parse(model=MODEL_NAME, messages=messages, response_format=Joke, **more)

    answer = parse(max_tokens=60)
    assert answer.choices[0].message.parsed == Joke(setup="Cat?", punchline="Mat.")
    assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(LengthFinishReasonError):
        parse(max_tokens=8)


def test_parsed_tools(client: OpenAI) -> None:
    class Mood(BaseModel):
        mood: Literal["good", "bad"]

    answer = client.chat.completions.parse(
        model=MODEL_NAME,
        messages=HELLO,
        tools=[pydantic_function_tool(Mood)],
        tool_choice="required",
        max_tokens=80,
        parallel_tool_calls=False,
    )
    call = answer.choices[0].message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Mood)


def test_schemas_in_a_stream(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL_NAME, messages=[{"role": "user", "content": CATS}], response_format=Joke, max_tokens=60
    ) as stream:
        parsed = [event.parsed for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message.parsed
    assert final == Joke(setup="Cat?", punchline="Mat.")
    assert len(parsed) > 3


def test_json_objects_and_what_is_cut_off(client: OpenAI) -> None:
    def json_object(**more: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": CATS}],
            response_format={"type": "json_object"},
            **more,
        ).choices[0]

    whole = json_object(max_tokens=60)
    assert json.loads(whole.message.content) == {"setup": "Cat?", "punchline": "Mat."}
    assert whole.finish_reason == "stop"
    assert json_object(max_tokens=60, stop=["}"]).message.content == whole.message.content
    cut = json_object(max_tokens=6)
    assert cut.finish_reason == "length"
    assert whole.message.content.startswith(cut.message.content)
    call = ask(client, max_tokens=16).choices[0]
    assert call.finish_reason == "length"


def test_a_schema_beside_tools(client: OpenAI) -> None:
    """An answer is a call, or what the schema says."""
    schema = {"type": "json_schema", "json_schema": {"name": "Joke", "schema": Joke.model_json_schema()}}
    called = ask(client, response_format=schema)
    assert called.choices[0].message.tool_calls[0].function.name == "get_weather"
    said = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": CATS}],
        tools=as_tools(WEATHER),
        response_format=schema,
        max_tokens=200,
        temperature=1.0,
        seed=1,
    )
    assert (
        said.choices[0].message.tool_calls
        or said.choices[0].finish_reason == "length"
        or Joke.model_validate_json(said.choices[0].message.content)
    )


def test_a_schema_that_a_tool_cannot_keep_is_the_caller_s_error(tool_server: Running) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {}, "required": ["a"]}}}]
    with tool_server.client() as http:
        body = {"model": MODEL_NAME, "messages": HELLO, "tools": tools}
        response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "required property 'a' is unsatisfiable" in response.json()["error"]["message"]
