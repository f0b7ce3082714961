"""Tools and structured output with `serve --engine vllm`, by the `openai` client's own helpers."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import httpx
import pytest
from openai import LengthFinishReasonError, OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

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
from tests.tiny import text_of
from tests.vllm.running import serving


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The model that was taught to call, in vLLM."""
    engine, directory = taught_engine(head_dim=32), tmp_path_factory.mktemp("taught")
    engine.model.save_pretrained(directory / "model")
    engine.tokenizer.save_pretrained(directory / "model")
    with serving(directory / "model", directory, "--model-name", "taught") as server:
        yield server.url


@pytest.fixture
def client(url):
    with OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def ask(client: OpenAI, messages: Any = SAN_FRANCISCO, tools: Any = WEATHER, **more: Any) -> Any:
    return client.chat.completions.create(
        model="taught", messages=messages, tools=as_tools(tools), max_tokens=more.pop("max_tokens", 80), **more
    )


def test_a_model_may_call(client):
    choice = ask(client).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"location": "SF"})


def test_words_and_a_call_in_a_stream(client):
    tools, question = {"search_town": ("query",)}, [{"role": "user", "content": TOWN_QUESTION}]
    deltas = [piece.choices[0].delta for piece in ask(client, question, tools, stream=True) if piece.choices]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert calls[0].function.name == "search_town"
    assert json.loads("".join(call.function.arguments for call in calls)) == {"query": "museum"}


def test_choices(client):
    def names(**more: Any) -> list[str]:
        return [call.function.name for call in ask(client, HELLO, TWO, **more).choices[0].message.tool_calls or ()]

    assert names(tool_choice="required") == ["get_weather"]
    assert names(tool_choice={"type": "function", "function": {"name": "magic_function"}}) == ["magic_function"]
    assert names(tool_choice="none", max_tokens=4) == []


def test_a_tool_s_answer_is_reused(client, url):
    texts = [text_of(70, seed=seed) for seed in range(2)]
    httpx.put(f"{url}/chunks", json={"chunks": texts}, timeout=None).raise_for_status()
    asked, tools = [{"role": "user", "content": TOWN_QUESTION}], {"search_town": ("query",)}
    said = ask(client, asked, tools).choices[0].message
    found = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "\n\n".join(texts)}
    history = [*asked, said.model_dump(exclude_none=True), found]
    answer = ask(client, history, tools, tool_choice="required", max_tokens=4)
    assert [chunk["status"] for chunk in answer.prophetkv["chunks"]] == ["hit", "hit"]
    assert answer.prophetkv["reused_tokens"] > 0


def test_parse_with_a_pydantic_model(client):
    def parse(**more: Any) -> Any:
        messages = [{"role": "user", "content": CATS}]
        return client.chat.completions.parse(model="taught", messages=messages, response_format=Joke, **more)

    answer = parse(max_tokens=60)
    assert answer.choices[0].message.parsed == Joke(setup="Cat?", punchline="Mat.")
    assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(LengthFinishReasonError):
        parse(max_tokens=8)


def test_what_is_held_to_a_schema_parses_however_it_is_drawn(client):
    """At a temperature at which this model writes nonsense where nothing holds it."""

    class Mood(BaseModel):
        mood: Literal["good", "bad", "none of them"]
        sure: bool
        why: Annotated[list[Literal["weather", "news"]], Field(max_length=2)]

    for seed in range(8):
        answer = client.chat.completions.parse(
            model="taught", messages=HELLO, response_format=Mood, temperature=2.0, seed=seed, max_tokens=300
        )
        assert isinstance(answer.choices[0].message.parsed, Mood)
        answer = client.chat.completions.parse(
            model="taught",
            messages=HELLO,
            tools=[pydantic_function_tool(Mood)],
            tool_choice="required",
            temperature=2.0,
            seed=seed,
            max_tokens=300,
            parallel_tool_calls=False,
        )
        (call,) = answer.choices[0].message.tool_calls
        assert isinstance(call.function.parsed_arguments, Mood)


def test_a_schema_beside_tools(client):
    schema = {"type": "json_schema", "json_schema": {"name": "Joke", "schema": Joke.model_json_schema()}}
    called = ask(client, response_format=schema)
    assert called.choices[0].message.tool_calls[0].function.name == "get_weather"
    whole = client.chat.completions.create(
        model="taught",
        messages=[{"role": "user", "content": CATS}],
        response_format={"type": "json_object"},
        max_tokens=60,
    ).choices[0]
    assert json.loads(whole.message.content) == {"setup": "Cat?", "punchline": "Mat."}


def test_a_schema_that_cannot_be_kept_is_the_caller_s_error(url):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {}, "required": ["a"]}}}]
    response = httpx.post(
        f"{url}/chat/completions", json={"model": "taught", "messages": HELLO, "tools": tools}, timeout=None
    )
    assert response.status_code == 400
    assert "required property 'a' is unsatisfiable" in response.json()["error"]["message"]
