"""LangChain messages to the plain dictionaries that a tokenizer's chat template takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, FunctionMessage, ToolMessage

from prophetkv_rag.errors import InputError
from prophetkv_rag.prompt import content_text

if TYPE_CHECKING:
    from prophetkv_rag.prompt import ChunkIndex

ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"}
"""LangChain's message types and the roles that chat templates know."""

_OTHER_NAMES = {**ROLES, "developer": "system"}
"""What a `ChatMessage` may call these roles; others reach the template as they are."""

_DOCUMENT_REPR = re.compile(r"""Document\((?:id=[^,\n]{1,200}, )?metadata=\{.*?page_content=['"]""", re.DOTALL)


def to_template_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Return messages with `role` and `content`, and where there are any, tool calls and what answers them.

    What an assistant's message holds beside text (thoughts, citations, server-side tools) is left out; the calls stand
    in `tool_calls`. The engine fits the messages to the model's chat template.

    Raises:
        InputError: If another message holds something that is not text.
    """
    return [_to_dict(message) for message in messages]


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


def _role(message: BaseMessage) -> str | None:
    if isinstance(message, ChatMessage):
        return _OTHER_NAMES.get(message.role, message.role)
    return ROLES.get(message.type)


def _to_dict(message: BaseMessage) -> dict[str, Any]:
    role = _role(message)
    if role is None:
        msg = f"a message of type {message.type!r} cannot be shown to the model; allowed: {', '.join(ROLES)}, chat"
        raise InputError(msg)
    plain: dict[str, Any] = {"role": role, "content": content_text(message.content, role)}
    if isinstance(message, AIMessage) and message.tool_calls:
        plain["tool_calls"] = [
            {
                "type": "function",
                "id": call.get("id") or "",
                "function": {"name": call["name"], "arguments": call["args"]},
            }
            for call in message.tool_calls
        ]
    elif isinstance(message, AIMessage):  # OpenAI's models say these apart; the engine reads both
        apart = {key: message.additional_kwargs.get(key) for key in ("refusal", "function_call")}
        plain |= {key: value for key, value in apart.items() if value}
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, (ToolMessage, FunctionMessage)) and message.name:
        plain["name"] = message.name
    return plain
