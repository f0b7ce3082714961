"""LlamaIndex chat messages as the engine takes them, whoever wrote them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from llama_index.core.base.llms import types
from llama_index.core.base.llms.types import (
    AudioBlock,
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
    VideoBlock,
)
from llama_index.core.memory import ChatMemoryBuffer, Memory

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index import ProphetKVLLM
from prophetkv_rag.integrations.llama_index.messages import to_template_messages
from tests.strict_templates import HISTORIES, NO_SYSTEM, STRICT_TEMPLATES
from tests.tiny import tiny_tokenizer

TEXT = TextBlock(text="Hello.")
BLOCKS: dict[str, Any] = {
    "TextBlock": TEXT,
    "ThinkingBlock": ThinkingBlock(content="They greet me."),
    "ToolCallBlock": ToolCallBlock(tool_call_id="1", tool_name="f", tool_kwargs={"a": 1}),
    "CachePoint": CachePoint(cache_control={"type": "ephemeral"}),
    "CitationBlock": CitationBlock(cited_content=TEXT, source="s", title="t", additional_location_info={}),
    "CitableBlock": CitableBlock(title="t", source="s", content=[TEXT]),
    "ImageBlock": ImageBlock(image=b"x", image_mimetype="image/png"),
    "AudioBlock": AudioBlock(audio=b"x", format="wav"),
    "VideoBlock": VideoBlock(video=b"x", video_mimetype="video/mp4"),
    "DocumentBlock": DocumentBlock(data=b"x", title="t", document_mimetype="application/pdf"),
}
READ_EVERYWHERE = {"TextBlock", "CitableBlock", "CachePoint"}


def test_every_kind_of_block_is_known_here() -> None:
    """A new kind in LlamaIndex must be looked at: what does a history hold it for?"""
    classes = [value for value in vars(types).values() if inspect.isclass(value)]
    kinds = {kind.__name__ for kind in classes if "block_type" in getattr(kind, "model_fields", {})}
    assert kinds == set(BLOCKS)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_history_of_another_model_is_answered(kind: str, llm: ProphetKVLLM) -> None:
    spoken = ChatMessage(role="assistant", blocks=[BLOCKS[kind], TextBlock(text="Good day.")])
    history = [ChatMessage(role="user", content="Hi"), spoken, ChatMessage(role="user", content="When?")]
    assert llm.chat(history).raw is not None
    said = to_template_messages(history)[1]["content"]
    assert said == ("Hello.\nGood day." if kind == "TextBlock" else "Good day.")


@pytest.mark.parametrize("role", ["user", "system", "tool"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_what_is_no_text_is_refused_in_other_turns(kind: str, role: str) -> None:
    message = ChatMessage(role=role, blocks=[TextBlock(text="Look."), BLOCKS[kind]])
    if kind in READ_EVERYWHERE:
        assert to_template_messages([message])[0]["content"] in ("Look.", "Look.\nHello.")
    else:
        with pytest.raises(InputError, match=f"^a {role} message holds a block of type {kind}; this model reads text"):
            to_template_messages([message])


def test_messages_keep_their_roles_calls_and_ids() -> None:
    messages = [
        ChatMessage(role=role, content=role.value)
        for role in (MessageRole.SYSTEM, MessageRole.USER, MessageRole.MODEL, MessageRole.TOOL, MessageRole.USER)
    ]
    roles = [message["role"] for message in to_template_messages(messages)]
    assert roles == ["system", "user", "assistant", "tool", "user"]
    shown = [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": 1}}}]
    older = {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]}
    for called in (
        ChatMessage(role="assistant", blocks=[BLOCKS["ToolCallBlock"]]),
        ChatMessage(role="assistant", content="", additional_kwargs=older),
    ):
        answer = ChatMessage(role="tool", content="R", additional_kwargs={"tool_call_id": "1", "name": "f"})
        assert to_template_messages([called, answer]) == [
            {"role": "assistant", "content": "", "tool_calls": shown},
            {"role": "tool", "content": "R", "tool_call_id": "1", "name": "f"},
        ]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("template", STRICT_TEMPLATES)
def test_strict_templates_read_what_the_engine_alone_reads(
    template: str, history: str, fresh_engine: ProphetKVEngine
) -> None:
    fresh_engine.tokenizer.chat_template = STRICT_TEMPLATES[template]
    llm = ProphetKVLLM(engine=fresh_engine, max_new_tokens=1)
    messages = [
        ChatMessage(
            role=message["role"],
            content=message["content"] or "",
            additional_kwargs={key: value for key, value in message.items() if key.startswith("tool")},
        )
        for message in HISTORIES[history]
    ]
    llm.chat(messages)
    alone = fresh_engine.read(HISTORIES[history]).input_ids
    assert llm.last_report.prompt_tokens == len(alone)
    assert fresh_engine.read(to_template_messages(messages)).input_ids.equal(alone)


def test_a_window_is_known_for_a_template_without_system_messages(fresh_engine: ProphetKVEngine) -> None:
    fresh_engine.tokenizer.chat_template = NO_SYSTEM
    assert 0 < ProphetKVLLM(engine=fresh_engine).metadata.context_window < fresh_engine.context_window


def test_token_memories_survive_a_turn_longer_than_their_limit(llm: ProphetKVLLM) -> None:
    tokenizer = tiny_tokenizer()
    long = ChatMessage(role="user", content="tell me a long story " * 20)
    for memory in (
        ChatMemoryBuffer.from_defaults(llm=llm, token_limit=30, tokenizer_fn=tokenizer.encode),
        Memory.from_defaults(token_limit=30, tokenizer_fn=tokenizer.encode),
    ):
        memory.put(long)
        memory.put(ChatMessage(role="assistant", blocks=[BLOCKS["ThinkingBlock"], TEXT]))
        memory.put(ChatMessage(role="user", content="Hi"))
        assert llm.chat(memory.get()).message is not None
