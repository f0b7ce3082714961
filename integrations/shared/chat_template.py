"""Plain `role`/`content` messages in a form that a tokenizer's chat template accepts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from prophetkv_rag.errors import InputError

logger = logging.getLogger(__name__)

Message: TypeAlias = dict[str, Any]


def fit_template(
    messages: Sequence[Message], tokenizer: Any, *, tools: Sequence[Mapping[str, Any]] | None = None
) -> list[Message]:
    """Return messages that the tokenizer's chat template takes: one to one, or rearranged by `alternate_roles`.

    Some templates refuse a system message, a tool message, or two messages of one role in a row; only then are
    messages rearranged.

    Args:
        messages: At least one message, `content` being text.
        tokenizer: A Hugging Face tokenizer with a chat template.
        tools: Tool descriptions that the messages will be rendered with.

    Raises:
        InputError: If there is no message, or the template refuses the rearranged messages too.
    """
    if not messages:
        msg = "there are no chat messages; pass at least one"
        raise InputError(msg)
    plain = list(messages)
    refusal = _refusal(plain, tokenizer, tools)
    if refusal is None:
        return plain
    rearranged = alternate_roles(plain)
    second_refusal = _refusal(rearranged, tokenizer, tools)
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


def _refusal(messages: list[Message], tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None) -> Exception | None:
    """Return why the template refuses the messages, or `None` if it takes them."""
    extra = {"tools": list(tools)} if tools else {}
    # A tokenizer that writes chats by code of its own (mistral-common's) warns whoever asks it for text.
    tokenize = not getattr(tokenizer, "chat_template", None)
    try:
        tokenizer.apply_chat_template(messages, tokenize=tokenize, add_generation_prompt=True, **extra)
    except Exception as error:  # a template's own, transformers' (several templates, no default), or that code's
        return error
    return None
