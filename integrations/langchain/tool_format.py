"""How a model's chat template shows tools and writes tool calls: found out by rendering, whatever the model's name.

A tool and a call with made-up names are rendered. If the tool's name shows up, the template supports tools; where the
call's name and arguments show up tells how the model was taught to write a call.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prophetkv_rag.errors import InputError

PROBE_NAME = "prophetkv_probe_tool"
PROBE_ARGUMENTS = {"probe_argument": "probe_value"}
_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe_argument": {"type": "string"}}},
    },
}
_ASKED = [{"role": "user", "content": "Hello."}]
_CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "probe0001", "function": {"name": PROBE_NAME, "arguments": PROBE_ARGUMENTS}}
    ],
}


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A call as the template writes it: `opening`, then JSON with the name and, under `arguments_key`, the arguments.

    Attributes:
        opening: Text between the start of the assistant's turn and the JSON object; may be empty.
        marker: The opening as it looks in decoded text: stripped, without special tokens and thoughts.
        arguments_key: `"arguments"`, or whatever the template calls them.
        before_name: The JSON up to the name, such as `{"name": "`.
        before_arguments: The JSON between the name and the arguments, such as `", "arguments": `.
    """

    opening: str
    marker: str
    arguments_key: str
    before_name: str
    before_arguments: str

    def forced_start(self, name: str | None, *, has_arguments: bool = False) -> str:
        """Return how a call begins: up to the tool's name, or with that given, inside the braces of its arguments.

        Small models go on behind `"arguments": ` with a bare value; behind a brace they cannot.
        """
        start = self.opening + self.before_name
        return start if name is None else start + name + self.before_arguments + ('{"' if has_arguments else "{")


def find_tool_format(tokenizer: Any) -> ToolFormat:
    """Return how the tokenizer's chat template writes tool calls.

    Raises:
        InputError: If the template shows no tools, or writes calls in another form than a JSON object.
    """
    if not getattr(tokenizer, "chat_template", None):
        msg = "the model's tokenizer has no chat template to show tools by; use a model with a tool template"
        raise InputError(msg)
    try:
        prompt = _render(tokenizer, _ASKED, add_generation_prompt=True)
        called = _render(tokenizer, [*_ASKED, _CALLED])
    except Exception as error:  # a template's own, transformers', or those of code in a template's place
        msg = f"the model's chat template cannot show tools ({error}); use a model with a tool template"
        raise InputError(msg) from error
    if PROBE_NAME not in prompt:
        msg = (
            "the model's chat template leaves tools out, so the model would never see them; "
            "use a model whose template shows tools (such as Qwen 2.5 or Llama 3.1), or set tokenizer.chat_template"
        )
        raise InputError(msg)
    answer = called[_turn_start(prompt, called) :]
    found = _find_call(answer)
    if found is None:
        msg = "the model's chat template writes tool calls in a form that is not JSON; only JSON calls can be read"
        raise InputError(msg)
    start, source, key = found
    before_name, _, rest = source.partition(PROBE_NAME)
    before_arguments = rest[: rest.index("{")] if "{" in rest else ""
    if key not in before_arguments:
        msg = "the model's chat template writes a call's arguments before its name; such calls cannot be read"
        raise InputError(msg)
    opening = answer[:start]
    marker = opening.rpartition("</think>")[2]  # templates of reasoning models put an empty thought first
    for special in tokenizer.all_special_tokens:
        marker = marker.replace(special, "")
    # A marker without letters (a list's bracket) would be found all over an answer.
    marker = marker.strip() if any(character.isalnum() for character in marker) else ""
    return ToolFormat(opening, marker, key, before_name, before_arguments)


def _render(tokenizer: Any, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    return str(
        tokenizer.apply_chat_template(
            list(messages), tools=[_TOOL], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _turn_start(prompt: str, called: str) -> int:
    """Return where the assistant's turn begins in `called`, which goes on like the prompt at least up to there."""
    if called.startswith(prompt):
        return len(prompt)
    differs = next(i for i, (a, b) in enumerate(zip(prompt, called + "\0", strict=False)) if a != b)
    return max(called.rfind(end, 0, differs) + 1 for end in "\n>")  # not inside a tag that both begin with


def _find_call(answer: str) -> tuple[int, str, str] | None:
    """Return (start of the call's JSON, its source, the key of the arguments), or `None` if there is none."""
    decoder = json.JSONDecoder()
    for start, character in enumerate(answer):
        if character != "{":
            continue
        try:
            call, size = decoder.raw_decode(answer[start:])
        except json.JSONDecodeError:
            continue
        if isinstance(call, dict) and call.get("name") == PROBE_NAME:
            for key, value in call.items():
                if value == PROBE_ARGUMENTS:
                    return start, answer[start : start + size], key
    return None
