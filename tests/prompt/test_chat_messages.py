"""Messages in every shape that chat APIs have, as plain text with a role."""

from __future__ import annotations

from typing import Any

import pytest

from prophetkv_rag import InputError, ProphetKVEngine
from prophetkv_rag.prompt import content_text, plain_messages
from tests.tiny import tiny_llama, tiny_tokenizer

NOT_TEXT: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    {"type": "image", "source": {"type": "base64", "data": "AAAA"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "video", "url": "https://example.com/v"},
    {"type": "file", "file": {"file_id": "1"}},
    {"type": "text"},
    {"type": "text", "text": None},
    {},
    {"audio": "AAAA"},
]
OTHER_MODELS_OWN: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "They greet me.", "signature": "x"},
    {"type": "redacted_thinking", "data": "x"},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "They greet me."}]},
    {"type": "tool_use", "id": "1", "name": "f", "input": {}},
    {"type": "server_tool_use", "id": "1", "name": "web_search", "input": {}},
    {"type": "web_search_tool_result", "tool_use_id": "1", "content": []},
    {"type": "invalid_tool_call", "name": "f", "args": "{", "error": "cut"},
    {"type": "citation", "cited_text": "a book"},
    {"type": "non_standard", "value": {"anything": 1}},
    {"type": "audio", "id": "audio_1"},
]
MARKS: list[dict[str, Any]] = [
    {"cachePoint": {"type": "default"}},
    {"type": "cache_point"},
    {"type": "non_standard", "value": {"cachePoint": {"type": "default"}}},
]


@pytest.mark.parametrize("part", [*NOT_TEXT, *OTHER_MODELS_OWN, *MARKS], ids=str)
def test_an_assistants_turn_is_never_refused(part: dict[str, Any]) -> None:
    text = {"type": "text", "text": "Hello.", "annotations": [{"type": "citation"}], "citations": []}
    assert content_text([part, text], "assistant") == "Hello."


@pytest.mark.parametrize("role", ["user", "system", "tool", "critic"])
def test_what_is_no_text_is_refused_elsewhere_and_marks_are_not(role: str) -> None:
    for part in NOT_TEXT:
        with pytest.raises(InputError, match=rf"^a {role} message holds a part of .*; this model reads text only"):
            content_text([{"type": "text", "text": "Look."}, part], role)
    for mark in MARKS:
        assert content_text([{"type": "text", "text": "Look."}, mark], role) == "Look."


@pytest.mark.parametrize(
    ("content", "role", "text"),
    [
        (None, "assistant", ""),
        ("plain", "user", "plain"),
        ([], "user", ""),
        (["one", {"text": "two"}], "user", "one\ntwo"),
        ([{"type": "input_text", "text": "one"}, {"type": "text-plain", "text": "two"}], "user", "one\ntwo"),
        ([{"type": "output_text", "text": "one"}], "assistant", "one"),
        ([{"type": "refusal", "refusal": "I cannot."}], "assistant", "I cannot."),
        ([{"type": "json", "json": {"a": "ä"}}], "tool", '{"a": "ä"}'),
        ([{"type": "tool_result", "content": [{"type": "text", "text": "R"}]}], "user", "R"),
        ([{"type": "search_result", "title": "t", "content": [{"type": "text", "text": "R"}]}], "tool", "R"),
    ],
)
def test_text_is_read_wherever_it_stands(content: Any, role: str, text: str) -> None:
    assert content_text(content, role) == text


def test_calls_are_as_templates_take_them() -> None:
    given = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": ""}},
        {"id": None, "type": "function", "function": {"name": "h", "arguments": "{cut"}},
        {"id": "4", "type": "custom", "custom": {"name": "c", "input": "print(1)"}},
        {"id": "5", "type": "function", "function": {"name": None}},
        "nonsense",
    ]
    message = {"role": "assistant", "content": None, "tool_calls": given, "name": "kept"}
    (plain,) = plain_messages([message])
    named = [("1", "f", {"a": 1}), ("2", "g", {}), ("", "h", "{cut"), ("4", "c", {"input": "print(1)"})]
    shown = [
        {"type": "function", "id": id_, "function": {"name": name, "arguments": arguments}}
        for id_, name, arguments in named
    ]
    assert plain == {"role": "assistant", "content": "", "name": "kept", "tool_calls": shown}
    assert message["tool_calls"] is given, "the caller's message is left alone"
    legacy = {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}, "tool_calls": None}
    assert plain_messages([legacy])[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert plain_messages([{"role": "assistant", "content": None, "refusal": "No."}])[0]["content"] == "No."


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no chat messages"),
        (["hello"], "message 0 is no chat message"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 1 is no chat message"),
        ([{"role": "user", "content": 5}], "content of a user message is a int"),
        ([{"role": "user", "content": b"5"}], "content of a user message is a bytes"),
    ],
)
def test_what_is_no_message_is_said(messages: Any, words: str) -> None:
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    for call in (engine.read, engine.prefill, engine.generate):
        with pytest.raises(InputError, match=words):
            call(messages)


def test_parts_are_read_like_a_string() -> None:
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    assert engine.read(parts).input_ids.equal(engine.read([{"role": "user", "content": "one\ntwo"}]).input_ids)
