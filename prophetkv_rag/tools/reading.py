"""Reading tool calls out of an answer, also while it is still coming in."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prophetkv_rag.tools.formats import ToolFormat

_DECODER = json.JSONDecoder()
_FENCE = "```json"


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A call as it is written: `arguments` is JSON once `is_whole`, and the beginning of it before."""

    name: str
    arguments: str
    is_whole: bool


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call with an id. `arguments` is the text of a JSON object, unless the answer was cut off inside it."""

    id: str
    name: str
    arguments: str
    is_whole: bool

    @property
    def values(self) -> dict[str, Any] | None:
        """The arguments; `None` if they are no JSON object."""
        with suppress(json.JSONDecodeError):
            found = json.loads(self.arguments)
            return found if isinstance(found, dict) else None
        return None


@dataclass(frozen=True, slots=True)
class CallDelta:
    """New of a call: with its first delta `name` and `id` are given; `arguments` is what was added to its text."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ToolPiece:
    """New of an answer: words that are no part of a call, and calls."""

    text: str
    calls: tuple[CallDelta, ...] = ()


def read_words(text: str, form: ToolFormat) -> tuple[str, str | None]:
    """Return an answer's words before its first call, and what follows the call's mark; `None` if there is no call."""
    if form.marker and form.marker_id is None:
        words, found, rest = text.partition(form.marker)
        return (words.rstrip(), rest) if found else (text, None)
    if not form.marker and text.startswith(form.lead):
        return "", text
    return text, None


def read_calls(source: str, form: ToolFormat) -> Iterator[WrittenCall]:
    """Yield the calls in what follows the first one's mark; the last may be unfinished."""
    at, lead = 0, form.lead
    while source.startswith(lead, at):
        name, found, _ = source[at + len(lead) :].partition(form.before_arguments)
        if not found:
            return
        at += len(lead) + len(name) + len(form.before_arguments)
        try:
            _, end = _DECODER.raw_decode(source, at)
        except json.JSONDecodeError:
            yield WrittenCall(name, source[at:], is_whole=False)
            return
        yield WrittenCall(name, source[at:end], is_whole=True)
        if form.between is None:
            return
        at, lead = end, form.between


def read_unmarked(text: str, names: Collection[str]) -> list[WrittenCall]:
    """Return the calls of an answer that is JSON from its first character, and names tools: small models forget marks.

    Args:
        text: The answer; there may be a fence around it.
        names: Names of the tools that the model was shown.
    """
    source = text.lstrip().removeprefix(_FENCE).lstrip()
    if source[:1] not in ("{", "["):
        return []
    calls = [call for call in _objects(source) if call.get("name") in names]
    arguments = [_arguments(call) for call in calls]
    return [
        WrittenCall(call["name"], json.dumps(given, ensure_ascii=False), is_whole=True)
        for call, given in zip(calls, arguments, strict=True)
    ]


def shown_words(text: str, form: ToolFormat) -> str:
    """Return how much of an unfinished answer without calls is certainly words, and no beginning of a call."""
    start = text.lstrip()
    if start[:1] in ("", "{", "[") or _FENCE.startswith(start[: len(_FENCE)]):
        return ""
    if not form.marker and form.lead.startswith(start[: len(form.lead)]):
        return ""
    for size in range(min(len(form.marker) - 1, len(text)), 0, -1):
        if text.endswith(form.marker[:size]):
            text = text[:-size]
            break
    return text.rstrip()


def _objects(source: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a text, one after the other; objects inside others are not looked at."""
    at = source.find("{")
    while at >= 0:
        try:
            value, at = _DECODER.raw_decode(source, at)
        except json.JSONDecodeError:
            at += 1
        else:
            if isinstance(value, dict):
                yield value
        at = source.find("{", at)


def _arguments(call: Mapping[str, Any]) -> Any:
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the arguments as JSON in a string
        with suppress(json.JSONDecodeError):
            return json.loads(arguments)
    return arguments
