"""Chat messages in a form that the model's own chat template accepts, rendered.

Templates differ in what they refuse: a system message, one that is not the first, two messages of a role in a row, a
tool's answer, a call that another model made. Everything that renders messages does it here, so that the command line,
the server and the frameworks send a model the same text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prophetkv_rag.errors import InputError

logger = logging.getLogger(__name__)


def render_messages(render: Callable[[Sequence[Mapping[str, Any]]], str], messages: Sequence[Mapping[str, Any]]) -> str:
    """Render messages up to the open assistant turn: one to one, or rearranged as little as the template demands.

    Args:
        render: Renders one arrangement of them by the model's template, or raises.
        messages: At least one plain message (`plain_messages`).

    Raises:
        InputError: If the template refuses the messages however they are arranged.
    """
    refusals: list[Exception] = []
    for arranged in arrangements(messages):
        try:
            text = render(arranged)
        except Exception as error:  # templates raise errors of their own, and whatever their expressions stumble over
            refusals.append(error)
            continue
        if refusals:
            logger.info("the chat template refuses these messages as they are (%s); they are rearranged", refusals[0])
        return text
    roles = ", ".join(str(message["role"]) for message in messages)
    msg = f"the model's chat template refuses messages with the roles {roles}: {refusals[-1]}"
    raise InputError(msg) from refusals[-1]


def arrangements(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages as they are, then rearranged more and more, each arrangement once."""
    tried = [[dict(message) for message in messages]]
    yield tried[0]
    for keeps_tools, keeps_system in ((True, True), (True, False), (False, True), (False, False)):
        arranged = alternate_roles(messages, keeps_system=keeps_system, keeps_tools=keeps_tools)
        if arranged not in tried:
            tried.append(arranged)
            yield arranged


def alternate_roles(
    messages: Sequence[Mapping[str, Any]], *, keeps_system: bool = False, keeps_tools: bool = False
) -> list[dict[str, Any]]:
    """Rearrange messages for a strict template: user and assistant in turn, starting with the user.

    Neighbours of one role are joined by a blank line; an assistant's turn without words goes; an opening assistant
    message follows an empty user message.

    Args:
        messages: Plain messages.
        keeps_system: All system text becomes one system message at the head, rather than the head of the first user
            message.
        keeps_tools: Calls and tool messages stay as they are, rather than becoming an assistant's and a user's words.
    """
    system = [message["content"] for message in messages if _role(message) == "system" and message["content"]]
    turns: list[dict[str, Any]] = []
    for message in messages:
        role, text = _role(message), message["content"]
        if role == "system":
            continue
        if keeps_tools and (role == "tool" or message.get("tool_calls")):
            turns.append(dict(message))
            continue
        if role == "tool":
            role = "user"
        if role == "assistant":
            text = _joined(text, *map(_as_text, message.get("tool_calls") or ()))
            if not text:
                continue
        if turns and turns[-1]["role"] == role and not turns[-1].get("tool_calls"):
            turns[-1]["content"] = _joined(turns[-1]["content"], text)
        else:
            turns.append({"role": role, "content": text})
    if not turns or turns[0]["role"] != "user":
        turns.insert(0, {"role": "user", "content": ""})
    if keeps_system and system:
        return [{"role": "system", "content": _joined(*system)}, *turns]
    turns[0]["content"] = _joined(*system, turns[0]["content"])
    return turns


def _role(message: Mapping[str, Any]) -> str:
    """Return which of the four roles that templates know a message has."""
    known = {"developer": "system", "function": "tool"}
    role = known.get(message["role"], message["role"])
    return role if role in ("system", "assistant", "tool") else "user"


def _as_text(call: Mapping[str, Any]) -> str:
    return json.dumps(call["function"], ensure_ascii=False, default=str)


def _joined(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)
