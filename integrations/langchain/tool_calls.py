"""Reading tool calls out of a model's answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import InvalidToolCall
from langchain_core.messages.tool import ToolCall, invalid_tool_call, tool_call

from prophetkv_rag.integrations.langchain.tool_format import ToolFormat

_DECODER = json.JSONDecoder()
_FENCE = "```json"


@dataclass(slots=True)
class Answer:
    """An answer taken apart: the text before its tool calls, and the calls."""

    text: str
    calls: list[ToolCall] = field(default_factory=list)
    invalid: list[InvalidToolCall] = field(default_factory=list)


def read_answer(text: str, tools: ToolFormat, names: Collection[str]) -> Answer:
    """Take an answer apart.

    A call begins with the template's marker. Without one, an answer that is JSON from its first character and names one
    of the tools is a call too: some templates have no marker, and small models forget theirs, or
    put a fence around it.

    Args:
        text: The decoded answer.
        tools: How the model's template writes calls.
        names: Names of the tools that the model was shown.
    """
    start = text.find(tools.marker) if tools.marker else -1
    if start < 0:
        source = text.lstrip().removeprefix(_FENCE).lstrip()
        calls = [call for call in _objects(source) if call.get("name") in names] if source[:1] in ("{", "[") else []
        answer = Answer("" if calls else text)
    else:
        answer = Answer(text[:start].rstrip())
        source = text[start + len(tools.marker) :].strip()
        calls = [call for call in _objects(source) if isinstance(call.get("name"), str)]
        if not calls:
            answer.invalid.append(invalid_tool_call(args=source, id=_new_id(), error="the call is not valid JSON"))
    for call in calls:
        arguments = _arguments(call, tools)
        if isinstance(arguments, dict):
            answer.calls.append(tool_call(name=call["name"], args=arguments, id=_new_id()))
        else:
            error = "the call's arguments are not a JSON object"
            shown = json.dumps(arguments, ensure_ascii=False)
            answer.invalid.append(invalid_tool_call(name=call["name"], args=shown, id=_new_id(), error=error))
    return answer


def shown_part(text: str, tools: ToolFormat) -> str:
    """Return how much of an unfinished answer is certainly text, and no beginning of a tool call."""
    start = text.lstrip()
    if start[:1] in ("{", "[") or _FENCE.startswith(start[: len(_FENCE)]):
        return ""
    if not tools.marker:
        return text
    at = text.find(tools.marker)
    if at >= 0:
        return text[:at].rstrip()
    for size in range(min(len(tools.marker) - 1, len(text)), 0, -1):
        if text.endswith(tools.marker[:size]):
            return text[:-size].rstrip()
    return text.rstrip()


def is_complete(text: str) -> bool:
    """Whether a forced call has all its JSON, so that nothing worth waiting for follows."""
    start = text.find("{")
    try:
        _DECODER.raw_decode(text[start:] if start >= 0 else "")
    except json.JSONDecodeError:
        return False
    return True


def _objects(source: str) -> list[dict[str, Any]]:
    """Return the JSON objects in a text, one after the other; objects inside others are not looked at."""
    found, at = [], source.find("{")
    while at >= 0:
        try:
            value, at = _DECODER.raw_decode(source, at)
        except json.JSONDecodeError:
            at += 1
        else:
            if isinstance(value, dict):
                found.append(value)
        at = source.find("{", at)
    return found


def _arguments(call: Mapping[str, Any], tools: ToolFormat) -> Any:
    arguments = call.get(tools.arguments_key, call.get("arguments", call.get("parameters", {})))
    if isinstance(arguments, str):  # some models write the arguments as JSON in a string
        with suppress(json.JSONDecodeError):
            return json.loads(arguments)
    return arguments


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
