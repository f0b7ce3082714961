"""Chat messages in the shapes that chat APIs and other models' histories have, as plain text with a role.

The model reads text. What an assistant's turn holds beside it (thoughts, citations, calls in a format of another
provider, pictures it made) was that model's own business and is left out; a picture that a user sends is what the
question is about, and refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.prompt.prompt import Message

_TEXT_KINDS = frozenset({"text", "input_text", "output_text", "text-plain"})
_NESTED_KINDS = frozenset({"tool_result", "search_result"})
_MARKS = frozenset({"cachePoint", "cache_point", "cache", "cache_control"})


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return copies of chat messages whose content is text, and whose tool calls are as chat templates take them.

    Args:
        messages: Each with a `role`, and a `content`: text, nothing, or a list of parts. Tool calls may have OpenAI's
            shape, with the arguments as JSON in a string.

    Raises:
        InputError: If there is no message, one has no role, or the content is something that only shows pictures,
            sound or files.
    """
    if not messages:
        msg = "the prompt is empty: there are no chat messages; give at least one"
        raise InputError(msg)
    return [_plain(number, message) for number, message in enumerate(messages)]


def content_text(content: Any, role: str) -> str:
    """Return the text of a message's content: a string, nothing, or a list of parts, a line break between two.

    Args:
        content: As chat APIs have it.
        role: The message's; in an assistant's turn, parts that are no text are left out.

    Raises:
        InputError: If a part of another turn is no text (an image, sound, a file).
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        msg = f"the content of a {role} message is a {type(content).__name__}; give a string or a list of text parts"
        raise InputError(msg)
    return "\n".join(_part_texts(content, role))


def _part_texts(parts: Sequence[Any], role: str) -> Iterator[str]:
    for part in parts:
        if isinstance(part, str):
            yield part
            continue
        fields: Mapping[str, Any] = part if isinstance(part, Mapping) else {}
        kind = fields.get("type", "text" if "text" in fields else None)
        if kind in _TEXT_KINDS and isinstance(fields.get("text"), str):
            yield fields["text"]
        elif kind == "refusal" and isinstance(fields.get("refusal"), str):
            yield fields["refusal"]
        elif kind == "json" and role == "tool":
            yield json.dumps(fields.get("json"), ensure_ascii=False, default=str)
        elif kind in _NESTED_KINDS and role != "assistant":
            yield content_text(fields.get("content"), "tool")
        elif role != "assistant" and not _is_mark(fields):
            named = repr(kind) if kind else f"no type ({type(part).__name__})"
            msg = (
                f"a {role} message holds a part of type {named}; this model reads text only, so pass a string, or "
                'parts of the form {"type": "text", "text": "..."}'
            )
            raise InputError(msg)


def _is_mark(part: Mapping[str, Any]) -> bool:
    """Whether a part only tells another provider where its cache may end."""
    inner = part.get("value") if part.get("type") == "non_standard" else None
    if isinstance(inner, Mapping):
        return _is_mark(inner)
    return part.get("type") in _MARKS or (bool(part) and set(part) <= _MARKS)


def _plain(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        msg = f'message {number} is no chat message; give {{"role": "user", "content": "..."}}'
        raise InputError(msg)
    plain = dict(message)
    content, refusal = message.get("content"), plain.pop("refusal", None)
    if not content and isinstance(refusal, str):
        content = refusal
    plain["content"] = content_text(content, message["role"])
    given, legacy = plain.pop("tool_calls", None), plain.pop("function_call", None)
    calls = [*(given if isinstance(given, (list, tuple)) else ()), {"function": legacy}]
    template_calls = [call for call in map(_template_call, calls) if call is not None]
    return plain | ({"tool_calls": template_calls} if template_calls else {})


def _template_call(call: Any) -> dict[str, Any] | None:
    """Return a call as chat templates take it: arguments as an object. `None` if it names no function."""
    fields = call if isinstance(call, Mapping) else {}
    custom, function = fields.get("custom"), fields.get("function")
    if isinstance(custom, Mapping):  # a tool of OpenAI's that takes free text
        function = {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    shown = {} if arguments in (None, "") else arguments
    named = {"name": function["name"], "arguments": shown}
    return {"type": "function", "id": str(fields.get("id") or ""), "function": named}
