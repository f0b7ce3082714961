"""Histories that other models wrote, token memories, and strict templates."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_classic.memory import ConversationSummaryBufferMemory, ConversationTokenBufferMemory
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_messages,
    trim_messages,
)
from langchain_core.messages.content import KNOWN_BLOCK_TYPES

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain import ChatProphetKV, ProphetKVLLM
from prophetkv_rag.integrations.langchain.messages import to_template_messages
from tests.integrations.taught import as_tools, tool_tokenizer
from tests.strict_templates import HISTORIES, STRICT_TEMPLATES
from tests.tiny import tiny_llama

TEXT = {"type": "text", "text": "Hello.", "annotations": [{"type": "citation", "cited_text": "x"}]}
BLOCKS: dict[str, dict[str, Any]] = {
    "text": TEXT,
    "text-plain": {"type": "text-plain", "mime_type": "text/plain", "text": "Notes."},
    "refusal": {"type": "refusal", "refusal": "I cannot."},
    "reasoning": {"type": "reasoning", "reasoning": "They greet me."},
    "tool_call": {"type": "tool_call", "id": "1", "name": "f", "args": {"a": 1}},
    "tool_call_chunk": {"type": "tool_call_chunk", "id": "1", "name": "f", "args": "{", "index": 0},
    "invalid_tool_call": {"type": "invalid_tool_call", "id": "1", "name": "f", "args": "{", "error": "cut"},
    "server_tool_call": {"type": "server_tool_call", "id": "1", "name": "web_search", "args": {}},
    "server_tool_call_chunk": {"type": "server_tool_call_chunk", "id": "1", "name": "web_search", "args": "{"},
    "server_tool_result": {"type": "server_tool_result", "tool_call_id": "1", "status": "success", "output": "x"},
    "non_standard": {"type": "non_standard", "value": {"anything": 1}},
    "image": {"type": "image", "url": "https://example.com/i.png"},
    "audio": {"type": "audio", "base64": "AAAA", "mime_type": "audio/wav"},
    "video": {"type": "video", "url": "https://example.com/v.mp4"},
    "file": {"type": "file", "base64": "AAAA", "mime_type": "application/pdf"},
}
WORDS = {"text": "Hello.\n", "text-plain": "Notes.\n", "refusal": "I cannot.\n"}


@pytest.fixture
def model(chat_engine: ProphetKVEngine) -> ChatProphetKV:
    return ChatProphetKV(engine=chat_engine, max_tokens=2)


def test_every_kind_of_block_is_known_here() -> None:
    """A new kind in LangChain must be looked at: what does a history hold it for?"""
    assert set(BLOCKS) >= KNOWN_BLOCK_TYPES  # older releases know fewer


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("version", ["v0", "v1"])
def test_a_history_of_another_model_is_answered(kind: str, version: str, model: ChatProphetKV) -> None:
    blocks = [BLOCKS[kind], {"type": "text", "text": "Good day."}]
    spoken = AIMessage(blocks, response_metadata={"output_version": version})
    history = [HumanMessage("Hi"), spoken, HumanMessage("When?")]
    assert isinstance(model.invoke(history), AIMessage)
    assert to_template_messages(history)[1]["content"] == WORDS.get(kind, "") + "Good day."


@pytest.mark.parametrize("kind", sorted(set(BLOCKS) - set(WORDS)))
def test_what_is_no_text_is_refused_in_other_turns(kind: str, model: ChatProphetKV) -> None:
    for message in (HumanMessage([TEXT, BLOCKS[kind]]), SystemMessage([TEXT, BLOCKS[kind]])):
        with pytest.raises(InputError, match=rf"holds a part of type '{kind}'; this model reads text only"):
            model.invoke([message])


def test_what_openai_s_models_say_apart(model: ChatProphetKV) -> None:
    refused = AIMessage("", additional_kwargs={"refusal": "I cannot."})
    called = AIMessage("", additional_kwargs={"function_call": {"name": "f", "arguments": '{"a": 1}'}})
    history = [HumanMessage("Hi"), refused, ChatMessage("Be brief.", role="developer"), called, HumanMessage("When?")]
    assert [message["role"] for message in to_template_messages(history)][2] == "system"
    tokens = model.engine.library.tokens
    assert "I cannot." in tokens.render(to_template_messages(history))
    assert isinstance(model.invoke(history), AIMessage)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("template", STRICT_TEMPLATES)
def test_strict_templates_read_what_the_engine_alone_reads(
    template: str, history: str, fresh_engine: ProphetKVEngine
) -> None:
    fresh_engine.tokenizer.chat_template = STRICT_TEMPLATES[template]
    model = ChatProphetKV(engine=fresh_engine, max_tokens=1)
    messages = convert_to_messages([m | {"content": m["content"] or ""} for m in HISTORIES[history]])
    alone = fresh_engine.read(HISTORIES[history]).input_ids
    assert model.invoke(messages).usage_metadata["input_tokens"] == len(alone)
    assert model.get_num_tokens_from_messages(messages) == len(alone)
    assert fresh_engine.read(to_template_messages(messages)).input_ids.equal(alone)


def test_tools_are_shown_by_a_strict_template_too() -> None:
    tokenizer = tool_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    engine = ProphetKVEngine(tiny_llama(max_position_embeddings=4096), tokenizer)
    model = ChatProphetKV(engine=engine, max_tokens=2)
    messages, tools = [SystemMessage("Be brief."), HumanMessage("When?")], as_tools({"look_up": ("what",)})
    answer = model.bind_tools(tools).invoke(messages)
    counted = model.get_num_tokens_from_messages(messages, tools=tools)
    assert answer.usage_metadata["input_tokens"] == counted > model.get_num_tokens_from_messages(messages)


def test_no_messages_have_no_tokens(model: ChatProphetKV, chat_engine: ProphetKVEngine) -> None:
    assert model.get_num_tokens_from_messages([]) == 0
    assert model.get_num_tokens_from_messages([], tools=as_tools({"f": ("a",)})) == 0
    assert ProphetKVLLM(engine=chat_engine).get_num_tokens_from_messages([]) == 0


@pytest.mark.parametrize("kind", [ConversationTokenBufferMemory, ConversationSummaryBufferMemory])
def test_token_memories_survive_a_turn_longer_than_their_limit(kind: Any, model: ChatProphetKV) -> None:
    memory = kind(llm=model, max_token_limit=20, return_messages=True)
    memory.save_context({"input": "tell me a long story " * 5}, {"output": "once upon a time " * 20})
    assert not [m for m in memory.chat_memory.messages if isinstance(m, HumanMessage)]


@pytest.mark.parametrize("template", [None, *STRICT_TEMPLATES])
@pytest.mark.parametrize("strategy", ["first", "last"])
def test_messages_are_trimmed_by_the_models_own_count(
    strategy: str, template: str | None, fresh_engine: ProphetKVEngine
) -> None:
    if template is not None:
        fresh_engine.tokenizer.chat_template = STRICT_TEMPLATES[template]
    model = ChatProphetKV(engine=fresh_engine, max_tokens=1)
    called = AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])
    messages = [
        SystemMessage("Be brief."),
        HumanMessage("one " * 30),
        called,
        ToolMessage("R " * 30, tool_call_id="1"),
        AIMessage([BLOCKS["reasoning"], TEXT]),
        HumanMessage("When?"),
    ]
    for limit in (1, 60, 120, 10_000):
        kept = trim_messages(messages, max_tokens=limit, token_counter=model, strategy=strategy)
        assert model.get_num_tokens_from_messages(kept) <= limit
    assert len(kept) == len(messages)
