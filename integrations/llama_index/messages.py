"""LlamaIndex chat messages to the plain `role`/`content` dictionaries that a tokenizer's chat template takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.shared import alternate_roles, fit_template

__all__ = ["Message", "alternate_roles", "message_text", "to_template_messages"]

Message: TypeAlias = dict[str, str]

TEMPLATE_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}
"""LlamaIndex has eight roles; chat templates know four."""


def message_text(message: ChatMessage) -> str:
    """Return the text of a message: its text blocks, a line break between two.

    Raises:
        InputError: If a block is not text (an image, audio, a document, a tool call).
    """
    for block in message.blocks:
        if not isinstance(block, TextBlock):
            msg = (
                f"a {message.role.value} message holds a block of type {type(block).__name__}; "
                "this model reads text only, so pass TextBlock blocks or a string"
            )
            raise InputError(msg)
    return message.content or ""


def to_template_messages(messages: Sequence[ChatMessage], tokenizer: Any) -> list[Message]:
    """Return the messages in a form that the tokenizer's chat template accepts.

    They are passed on one to one wherever the template takes them. Some templates refuse a system message, a tool
    message, or two messages of one role in a row; only then are they rearranged by `alternate_roles`.

    Args:
        messages: At least one message, text blocks only.
        tokenizer: A Hugging Face tokenizer with a chat template.

    Raises:
        InputError: If there is no message, a block is not text, or the template refuses the rearranged messages too.
    """
    plain = [{"role": TEMPLATE_ROLES[message.role], "content": message_text(message)} for message in messages]
    return fit_template(plain, tokenizer)
