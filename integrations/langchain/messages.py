"""LangChain messages to the plain dictionaries that a tokenizer's chat template takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, FunctionMessage, ToolMessage

from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.prompt import ChunkIndex

ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"}
"""LangChain's message types and the roles that chat templates know."""

NOT_FOR_THE_MODEL = frozenset(
    {"tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "reasoning", "thinking", "non_standard"}
)
"""Blocks of an assistant's message that are left out: its tool calls stand in `tool_calls`, too."""

_DOCUMENT_REPR = re.compile(r"""Document\((?:id=[^,\n]{1,200}, )?metadata=\{.*?page_content=['"]""", re.DOTALL)


def to_template_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Return messages with `role` and `content`, and where there are any, tool calls and what answers them.

    Raises:
        InputError: If a message holds something that is not text.
    """
    return [_to_dict(message) for message in messages]


def message_text(message: BaseMessage) -> str:
    """Return the text of a message: its text blocks, a line break between two.

    Raises:
        InputError: If a block is an image, audio, a file or the like.
    """
    if isinstance(message.content, str):
        return message.content
    return "\n".join(_block_texts(message, message.content))


def holds_document_repr(messages: Iterable[dict[str, Any]], chunk_index: ChunkIndex) -> bool:
    """Whether a prompt shows LangChain documents as Python source outside its chunks: retrieved, but not formatted."""
    return any(
        _DOCUMENT_REPR.search(message["content"]) and _DOCUMENT_REPR.search(_glue(message["content"], chunk_index))
        for message in messages
    )


def _glue(text: str, chunk_index: ChunkIndex) -> str:
    parts, end = [], 0
    for match in chunk_index.find(text):
        parts.append(text[end : match.start])
        end = match.end
    return "\0".join([*parts, text[end:]])


def _block_texts(message: BaseMessage, blocks: Iterable[Any]) -> Iterable[str]:
    for block in blocks:
        if isinstance(block, str):
            yield block
            continue
        kind = block.get("type")
        if kind in ("text", "input_text", "output_text") or (kind is None and "text" in block):
            yield str(block.get("text", ""))
        elif kind == "json" and isinstance(message, ToolMessage):
            yield str(block.get("json"))
        elif not (isinstance(message, AIMessage) and kind in NOT_FOR_THE_MODEL):
            msg = (
                f"a {message.type} message holds a block of type {kind!r}; "
                "this model reads text only, so pass strings or blocks of type 'text'"
            )
            raise InputError(msg)


def _to_dict(message: BaseMessage) -> dict[str, Any]:
    role = message.role if isinstance(message, ChatMessage) else ROLES.get(message.type)
    if role is None:
        msg = f"a message of type {message.type!r} cannot be shown to the model; allowed: {', '.join(ROLES)}, chat"
        raise InputError(msg)
    plain: dict[str, Any] = {"role": role, "content": message_text(message)}
    if isinstance(message, AIMessage) and message.tool_calls:
        plain["tool_calls"] = [
            {
                "type": "function",
                "id": call.get("id") or "",
                "function": {"name": call["name"], "arguments": call["args"]},
            }
            for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, (ToolMessage, FunctionMessage)) and message.name:
        plain["name"] = message.name
    return plain
