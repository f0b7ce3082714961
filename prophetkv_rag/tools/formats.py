"""How a model's chat template shows tools and writes tool calls: found out by rendering, whatever the model's name.

Tools and calls with made-up names are rendered. If a tool's name shows up, the template supports tools; what stands
around the names and arguments of one call, and of two, tells how the model was taught to write calls. So one reader
serves Hermes and Qwen (`<tool_call>` around JSON), Llama 3.x (bare JSON), Mistral (a special token and a list) and
others, as long as the arguments are a JSON object behind the name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prophetkv_rag.errors import InputError

NAMES = ("prophetkv_probe_tool", "prophetkv_other_probe")
ARGUMENTS: tuple[dict[str, str], ...] = ({"probe_argument": "probe_value"}, {"other_argument": "other_value"})
_IDS = ("probe0001", "probe0002")  # nine characters, which Mistral's templates insist on
_WORDS = "prophetkv probe words"
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A probe.",
            "parameters": {"type": "object", "properties": {key: {"type": "string"} for key in arguments}},
        },
    }
    for name, arguments in zip(NAMES, ARGUMENTS, strict=True)
]
_ASKED = {"role": "user", "content": "Hello."}
_ID_FIELD = re.compile(r',\s*"[^"]*":\s*"probe000\d"')
"""A call's id inside its JSON; it is the program's, not the model's."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Calls as the template writes them: `opening marker lead NAME before_arguments JSON [between NAME ...] closing`.

    Attributes:
        opening: What an answer that is a call begins with, before the marker: an empty thought, or nothing.
        marker: Says that a call begins; empty where a call has no mark but its own beginning, `lead`.
        marker_id: The marker's token, where it is a special one: it may then show in no decoded text.
        lead: Between the marker and the first tool's name.
        before_arguments: Between a tool's name and its arguments.
        between: Between a call's arguments and the next one's name; `None` if the template writes one call only.
        closing: Behind the last call's arguments.
        specials: Special tokens by their text, and tags that are a token.
    """

    opening: str
    marker: str
    marker_id: int | None
    lead: str
    before_arguments: str
    between: str | None
    closing: str
    specials: dict[str, int]


def find_tool_format(tokenizer: Any) -> ToolFormat:
    """Return how the tokenizer's chat template writes tool calls.

    Raises:
        InputError: If the template shows no tools, or writes calls in a form that cannot be read.
    """
    if not getattr(tokenizer, "chat_template", None):
        msg = "the model's tokenizer has no chat template to show tools by; use a model with a tool template"
        raise InputError(msg)
    try:
        prompt = _render(tokenizer, [_ASKED], add_generation_prompt=True)
        called = _render(tokenizer, [_ASKED, _assistant(1)])
        added = tokenizer.added_tokens_decoder
    except Exception as error:  # a template's own, transformers', or those of code in a template's place
        msg = f"the model's chat template cannot show tools ({error}); use a model with a tool template"
        raise InputError(msg) from error
    if NAMES[0] not in prompt:
        msg = (
            "the model's chat template leaves tools out, so the model would never see them; "
            "use a model whose template shows tools (such as Qwen 2.5 or Llama 3.1), or set tokenizer.chat_template"
        )
        raise InputError(msg)
    said = _said(tokenizer)
    answer = called[_turn_start(prompt, said, called) :]
    head, before_arguments, tail = _split(answer, 1)
    specials = {token.content: number for number, token in added.items() if _is_special(token)}
    thought, mark, rest = head.rpartition("</think>")  # templates of reasoning models put an empty thought first
    behind = rest.lstrip()
    opening = thought + mark + rest[: len(rest) - len(behind)]
    if prompt.rstrip().endswith("<think>"):  # the prompt opens a thought, which a call that is forced has to end
        opening = "</think>\n\n"
    marker = _marker(behind, specials)
    return ToolFormat(
        opening,
        marker,
        specials.get(marker),
        behind[len(marker) :],
        before_arguments,
        _between(tokenizer, prompt, said),
        _without_turn_end(said, _without_id(tail), specials),
        specials,
    )


def _assistant(num_calls: int) -> dict[str, Any]:
    calls = [
        {"type": "function", "id": identifier, "function": {"name": name, "arguments": arguments}}
        for identifier, name, arguments in zip(_IDS, NAMES, ARGUMENTS, strict=True)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls[:num_calls]}


def _render(tokenizer: Any, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    return str(
        tokenizer.apply_chat_template(
            list(messages), tools=_TOOLS, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _said(tokenizer: Any) -> str:
    """Return a chat in which the assistant says some words; nothing of a template that wants to hear of no answer."""
    try:
        return _render(tokenizer, [_ASKED, {"role": "assistant", "content": _WORDS}])
    except Exception:
        return ""


def _turn_start(prompt: str, said: str, called: str) -> int:
    """Return where the assistant's words begin in `called`."""
    before = said.rpartition(_WORDS)[0]
    for opened in (prompt, before):
        if opened and called.startswith(opened):
            return len(opened)
    differs = next(i for i, (a, b) in enumerate(zip(before or prompt, called + "\0", strict=False)) if a != b)
    return max(called.rfind(end, 0, differs) + 1 for end in "\n>")  # not inside a tag that both begin with


def _split(answer: str, num_calls: int) -> list[str]:
    """Return what stands around names and arguments: before, name to arguments, arguments to name, ..., behind.

    Raises:
        InputError: If the arguments are no JSON object behind the name.
    """
    parts, at = [], 0
    for name, arguments in list(zip(NAMES, ARGUMENTS, strict=True))[:num_calls]:
        start = answer.find(name, at)
        found = _find_json(answer, start + len(name), arguments) if start >= 0 else None
        if found is None:
            is_before = start >= 0 and _find_json(answer, 0, arguments) is not None
            what = "a call's arguments before its name" if is_before else "tool calls in a form that is not JSON"
            msg = f"the model's chat template writes {what}; only a name with a JSON object behind it can be read"
            raise InputError(msg)
        parts += [answer[at:start], answer[start + len(name) : found[0]]]
        at = found[1]
    return [*parts, answer[at:]]


def _find_json(text: str, start: int, value: Any) -> tuple[int, int] | None:
    """Return where this JSON object stands in a text."""
    decoder = json.JSONDecoder()
    for at in (found.start() for found in re.finditer(r"\{", text) if found.start() >= start):
        try:
            found_value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            continue
        if found_value == value:
            return at, end
    return None


def _is_special(token: Any) -> bool:
    """Whether a grammar must name a token by its number: llguidance takes tags for special, whatever they say."""
    return bool(token.special) or (token.content.startswith("<") and token.content.endswith(">"))


def _marker(head: str, specials: dict[str, int]) -> str:
    for token in sorted(specials, key=len, reverse=True):
        if head.startswith(token):
            return token
    mark = re.split(r"[\[{]", head, maxsplit=1)[0].rstrip()
    # A marker without letters would be found all over an answer.
    return mark if any(character.isalnum() for character in mark) else ""


def _between(tokenizer: Any, prompt: str, said: str) -> str | None:
    try:
        called = _render(tokenizer, [_ASKED, _assistant(2)])
        return _without_id(_split(called[_turn_start(prompt, said, called) :], 2)[2])
    except Exception:  # some templates refuse two calls, or leave the second one out
        return None


def _without_turn_end(said: str, tail: str, specials: dict[str, int]) -> str:
    """Take away what ends any turn of the assistant."""
    end = said.rpartition(_WORDS)[2]
    if end and tail.endswith(end):
        return tail[: len(tail) - len(end)].rstrip()
    ends = [tail.find(token) for token in specials if token in tail]
    return tail[: min(ends, default=len(tail))].rstrip()


def _without_id(text: str) -> str:
    return _ID_FIELD.sub("", text)
