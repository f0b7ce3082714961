"""Tool calls as a grammar: free words until a call begins, or a call from the first token; arguments as declared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prophetkv_rag.generation import Grammar, json_rule, literal
from prophetkv_rag.tools.formats import ToolFormat


def call_grammar(
    form: ToolFormat,
    tools: Sequence[Mapping[str, Any]],
    *,
    forced: str | None,
    parallel: bool,
    answer: Mapping[str, Any] | None = None,
) -> Grammar:
    """Return the grammar of an answer that may call tools.

    Args:
        form: How calls are written.
        tools: Checked tools.
        forced: The tool that must be called, `""` for any, `None` if the model may also just answer.
        parallel: Whether it may call several.
        answer: A JSON schema that an answer without calls must meet.
    """
    called = [tool["function"] for tool in tools if not forced or tool["function"]["name"] == forced]
    rules = [
        f"call_{number}: {_spelt(function['name'] + form.before_arguments, form)} {json_rule(parameters(function))}"
        for number, function in enumerate(called)
    ]
    rules.append(f"call: {' | '.join(f'call_{number}' for number in range(len(called)))}")
    calls = "call"
    if parallel and form.between is not None:
        calls = f"call ({_spelt(form.between, form)} call)*"
        if form.closing:
            calls += f" [{_spelt(form.closing, form)}]"
    begun = f"{_spelt(form.lead, form)} {calls}"
    marker = _spelt(form.marker, form)
    if forced is not None:
        return _grammar(f"start: {_spelt(form.opening, form)} {marker} {begun}", rules)
    if answer is not None:
        return _grammar(f"start: answer | {marker} {begun}", [f"answer: {json_rule(answer)}", *rules])
    rules += [r"TEXT: /(.|\n)*/", f"before: {_tagged_words(form)}"]
    if form.marker_id is not None:
        return _grammar(f"start: before TEXT | before TEXT {marker} {begun}", rules)
    # As soon as its mark is complete a call has begun, and the words cannot go on.
    if form.marker:
        return _grammar(
            f"start: before TEXT | before seen {begun}", [*rules, f"seen[lazy]: TEXT {literal(form.marker)}"]
        )
    return _grammar(f"start: before TEXT | seen {calls}", [*rules, f"seen[lazy]: {literal(form.lead)}"])


def parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a function's arguments: an object's, and one without any where it declares none."""
    declared = function.get("parameters") or {"properties": {}}
    return {"type": "object", **declared}


def _tagged_words(form: ToolFormat) -> str:
    """Return words that end in a special token, such as a thought's, any number of times."""
    others = sorted(number for number in form.specials.values() if number != form.marker_id)
    return f"(TEXT <[{','.join(map(str, others))}]>)*" if others else '""'


def _grammar(start: str, rules: Sequence[str]) -> Grammar:
    return Grammar("\n".join([start, *rules, ""]))


def _spelt(text: str, form: ToolFormat) -> str:
    """Return a text as it stands in a grammar, special tokens by their number."""
    if not text:
        return ""
    names = "|".join(map(re.escape, sorted(form.specials, key=len, reverse=True))) or r"(?!)"
    parts = re.split(f"({names})", text)
    return " ".join(f"<[{form.specials[part]}]>" if part in form.specials else literal(part) for part in parts if part)
