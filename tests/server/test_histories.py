"""Chat histories in every shape of OpenAI's API, and models with strict templates, by real clients on a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from llama_index.core.base.llms.types import TextBlock, ThinkingBlock, ToolCallBlock
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from openai import OpenAI

from tests.server.running import MODEL_NAME, Running, make_engine, running
from tests.strict_templates import HISTORIES, NO_SYSTEM, STRICT_TEMPLATES, call

ASK = {"role": "user", "content": "When?"}
ASSISTANTS: dict[str, dict[str, Any]] = {
    "null": {"content": None},
    "nothing": {},
    "empty": {"content": []},
    "calls": {"content": None, "tool_calls": [call("f", '{"a": 1}')]},
    "custom_call": {"tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "f", "input": "x"}}]},
    "strange_calls": {"content": "x", "tool_calls": [{"id": 7}, "nonsense"]},
    "calls_that_are_none": {"content": "x", "tool_calls": {"name": "f"}},
    "a_number_of_calls": {"content": "x", "tool_calls": 5, "function_call": "f"},
    "function_call": {"content": None, "function_call": {"name": "f", "arguments": "{}"}},
    "refusal": {"content": None, "refusal": "I cannot."},
    "refusal_part": {"content": [{"type": "refusal", "refusal": "I cannot."}]},
    "thinking": {"content": [{"type": "thinking", "thinking": "..."}, {"type": "text", "text": "Hello."}]},
    "reasoning_content": {"content": "Hello.", "reasoning_content": "They greet me."},
    "image": {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
    "audio": {"content": None, "audio": {"id": "audio_1"}},
    "annotations": {"content": "Hello.", "annotations": [{"type": "url_citation"}], "name": "bot"},
    "client_s_own": {"content": "Hi", "refusal": None, "tool_calls": None, "function_call": None, "audio": None},
}


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    engine = make_engine()
    engine.tokenizer.chat_template = NO_SYSTEM
    with running(engine) as server:
        yield server


@pytest.mark.parametrize("kind", ASSISTANTS)
def test_what_an_assistant_said_is_never_refused(kind: str, server: Running, strict: Running) -> None:
    said = {"role": "assistant", **ASSISTANTS[kind]}
    for one in (server, strict):
        with OpenAI(base_url=one.api, api_key="none", max_retries=0) as client:
            for history in ([ASK, said, ASK], [said, ASK], [ASK, said]):
                answer = client.chat.completions.create(model=MODEL_NAME, messages=history, max_tokens=2)
                assert answer.usage.completion_tokens == 2
                assert answer.usage.prompt_tokens == len(one.engine.read(history).input_ids)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("template", STRICT_TEMPLATES)
def test_strict_templates(template: str, history: str, strict: Running) -> None:
    strict.engine.tokenizer.chat_template = STRICT_TEMPLATES[template]
    try:
        with OpenAI(base_url=strict.api, api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(model=MODEL_NAME, messages=HISTORIES[history], max_tokens=2)
        assert answer.usage.prompt_tokens == len(strict.engine.read(HISTORIES[history]).input_ids)
    finally:
        strict.engine.tokenizer.chat_template = NO_SYSTEM


def test_other_clients_histories(server: Running, strict: Running) -> None:
    called = AIMessage("", tool_calls=[{"name": "f", "args": {"a": 1}, "id": "1"}])
    lang = [SystemMessage("Be brief."), HumanMessage("When?"), called, ToolMessage("In 1862.", tool_call_id="1")]
    thought = [ThinkingBlock(content="..."), TextBlock(text="Hm."), ToolCallBlock(tool_name="f", tool_kwargs={})]
    llama = [ChatMessage(role="developer", content="Be brief."), ChatMessage(role="user", content="When?")]
    llama += [ChatMessage(role="assistant", blocks=thought), ChatMessage(role="user", content="Well?")]
    for one in (server, strict):
        model = ChatOpenAI(model=MODEL_NAME, base_url=one.api, api_key="none", max_tokens=2, max_retries=0)
        assert model.invoke(lang).usage_metadata["output_tokens"] == 2
        like = OpenAILike(model=MODEL_NAME, api_base=one.api, api_key="none", is_chat_model=True, max_tokens=2)
        assert like.chat(llama).raw.usage.completion_tokens == 2


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_id": "1"}},
    ],
    ids=lambda part: str(part["type"]),
)
def test_what_a_user_shows_is_refused_with_its_kind(part: dict[str, Any], server: Running) -> None:
    looking = [{"role": "user", "content": [{"type": "text", "text": "Look."}, part]}]
    with (
        OpenAI(base_url=server.api, api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.chat.completions.create(model=MODEL_NAME, messages=looking)
    assert caught.value.param == "messages.0.content"
    assert (
        f"a user message holds a part of type '{part['type']}'; this model reads text only"
        in caught.value.body["message"]
    )


def test_parts_are_read_like_a_string(server: Running) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]}]
    answer = server.ask(messages=parts).json()
    whole = server.ask(messages=[{"role": "user", "content": "one\ntwo"}]).json()
    assert answer["usage"] == whole["usage"]


@pytest.mark.parametrize("key", ["refusal", "tool_calls", "function_call", "content"])
def test_half_characters_are_replaced_and_deep_nests_end_no_server(key: str, server: Running) -> None:
    nest: Any = [{"type": "text", "text": "x"}]
    for _ in range(300):
        nest = [{"type": "tool_result", "content": nest}]
    role = "user" if key == "content" else "assistant"
    with server.client() as client:
        for value in ("half \ud800", nest):
            messages = [{"role": role, "content": "x"} | {key: value}, ASK]
            body = json.dumps({"model": MODEL_NAME, "messages": messages, "max_tokens": 2})
            response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            assert response.status_code in (200, 400), response.text
            if value != nest and key in ("content", "refusal"):  # the one rule of `text.py`: it becomes U+FFFD
                assert response.status_code == 200, response.text
        assert client.post("/v1/chat/completions", json=server.body()).status_code == 200
