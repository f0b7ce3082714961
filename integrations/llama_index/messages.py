"""LlamaIndex chat messages as the plain dictionaries that the engine takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)

from prophetkv_rag.errors import InputError
from prophetkv_rag.prompt import plain_messages

Message: TypeAlias = dict[str, Any]

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

    What an assistant's message holds beside text (thoughts, citations, calls, pictures that another model made) is
    left out, and so are marks for another provider's cache.

    Raises:
        InputError: If a block of another message is not text (an image, audio, a document).
    """
    return "\n".join(_block_texts(message.blocks, TEMPLATE_ROLES[message.role]))


def to_template_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Return messages with `role` and `content`, and where there are any, tool calls and what answers them.

    The engine fits them to the model's chat template.

    Raises:
        InputError: If there is no message, or one that is not an assistant's holds something that is no text.
    """
    return plain_messages([_to_dict(message) for message in messages])


def _to_dict(message: ChatMessage) -> Message:
    plain: Message = {"role": TEMPLATE_ROLES[message.role], "content": message_text(message)}
    if plain["role"] == "assistant":
        calls = [
            {"id": block.tool_call_id, "function": {"name": block.tool_name, "arguments": block.tool_kwargs}}
            for block in message.blocks
            if isinstance(block, ToolCallBlock)
        ]
        # Messages of older integrations have a provider's own objects here.
        kept = message.additional_kwargs.get("tool_calls") or ()
        given = [call if isinstance(call, dict) else _dumped(call) for call in kept]
        plain["tool_calls"] = calls or given
    elif plain["role"] == "tool":
        known = {name: message.additional_kwargs.get(name) for name in ("tool_call_id", "name")}
        plain |= {name: value for name, value in known.items() if isinstance(value, str)}
    return plain


def _dumped(call: Any) -> Any:
    return call.model_dump() if hasattr(call, "model_dump") else call


def _block_texts(blocks: Sequence[Any], role: str) -> Iterator[str]:
    for block in blocks:
        if isinstance(block, TextBlock):
            yield block.text
        elif isinstance(block, CitableBlock) and role != "assistant":
            yield from _block_texts(block.content, role)
        elif role != "assistant" and not isinstance(block, CachePoint):
            msg = (
                f"a {role} message holds a block of type {type(block).__name__}; "
                "this model reads text only, so pass TextBlock blocks or a string"
            )
            raise InputError(msg)
