"""LlamaIndex chat messages as a tokenizer's chat template takes them."""

from __future__ import annotations

import pytest
from llama_index.core.base.llms.types import ChatMessage, MessageRole

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index.messages import alternate_roles, to_template_messages
from tests.tiny import tiny_tokenizer

STRICT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}"
    "{% endfor %}"
)


def test_messages_pass_one_to_one_where_the_template_takes_them() -> None:
    messages = [
        ChatMessage(role=role, content=role.value)
        for role in (MessageRole.SYSTEM, MessageRole.USER, MessageRole.MODEL, MessageRole.TOOL, MessageRole.USER)
    ]
    roles = [message["role"] for message in to_template_messages(messages, tiny_tokenizer())]
    assert roles == ["system", "user", "assistant", "tool", "user"]


def test_strict_templates_get_alternating_roles() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = STRICT_TEMPLATE
    system, question, more = (
        ChatMessage(role="system", content="Be kind."),
        ChatMessage(role="user", content="Hi"),
        ChatMessage(role="user", content="there"),
    )
    assert to_template_messages([system, question, more], tokenizer) == [
        {"role": "user", "content": "Be kind.\n\nHi\n\nthere"}
    ]
    assert to_template_messages([question], tokenizer) == [{"role": "user", "content": "Hi"}]
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match=r"system, user: never"):
        to_template_messages([system, question], tokenizer)


def test_alternate_roles_keeps_every_text() -> None:
    messages = [
        {"role": "assistant", "content": "Welcome."},
        {"role": "system", "content": "S"},
        {"role": "tool", "content": "T"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    assert alternate_roles(messages) == [
        {"role": "user", "content": "S"},
        {"role": "assistant", "content": "Welcome."},
        {"role": "user", "content": "T\n\nU"},
        {"role": "assistant", "content": "A"},
    ]
    assert messages[3] == {"role": "user", "content": "U"}, "the caller's messages are left alone"
