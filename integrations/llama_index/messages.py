"""LlamaIndex chat messages to the plain `role`/`content` dictionaries that a tokenizer's chat template takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError
from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from prophetkv_rag.errors import InputError

logger = logging.getLogger(__name__)

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
    if not messages:
        msg = "there are no chat messages; pass at least one"
        raise InputError(msg)
    plain = [{"role": TEMPLATE_ROLES[message.role], "content": message_text(message)} for message in messages]
    refusal = _refusal(plain, tokenizer.apply_chat_template)
    if refusal is None:
        return plain
    rearranged = alternate_roles(plain)
    second_refusal = _refusal(rearranged, tokenizer.apply_chat_template)
    if second_refusal is None:
        logger.info("the chat template refuses these roles (%s); system and repeated roles are merged", refusal)
        return rearranged
    roles = ", ".join(message["role"] for message in plain)
    msg = f"the model's chat template refuses messages with the roles {roles}: {second_refusal}"
    raise InputError(msg) from second_refusal


def alternate_roles(messages: Sequence[Message]) -> list[Message]:
    """Rearrange messages for a strict template: user and assistant in turn, starting with the user.

    System text moves to the head of the first user message, tool results become user messages, and neighbours of one
    role are joined by a blank line. An opening assistant message follows an empty user message.
    """
    system = [message["content"] for message in messages if message["role"] == "system"]
    merged: list[Message] = []
    for message in messages:
        if message["role"] == "system":
            continue
        role = "assistant" if message["role"] == "assistant" else "user"
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += "\n\n" + message["content"]
        else:
            merged.append({"role": role, "content": message["content"]})
    if not merged or merged[0]["role"] == "assistant":
        merged.insert(0, {"role": "user", "content": ""})
    merged[0]["content"] = "\n\n".join(text for text in (*system, merged[0]["content"]) if text)
    return merged


def _refusal(messages: list[Message], render: Callable[..., Any]) -> TemplateError | None:
    """Return why the template refuses the messages, or `None` if it takes them."""
    try:
        render(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        return error
    return None
