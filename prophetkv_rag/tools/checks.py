"""What tools may be given, and which of them may be asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prophetkv_rag.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,256}")


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Return tools in OpenAI's form, each with a name and the schema of an object, if any.

    Raises:
        InputError: If one is something else.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        msg = f"tools must be a list; got {type(tools).__name__}"
        raise InputError(msg)
    checked: list[dict[str, Any]] = []
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            msg = (
                f'tool {number} is no function; give {{"type": "function", "function": {{"name": ..., '
                f'"description": ..., "parameters": JSON schema}}}}'
            )
            raise InputError(msg)
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            msg = f"tool {number} has the name {name!r}; a name is 1 to 256 of A-Z, a-z, 0-9, _, -, . and :"
            raise InputError(msg)
        if parameters is not None and not isinstance(parameters, Mapping):
            msg = f"the parameters of the tool {name!r} are no JSON schema of an object; got {parameters!r}"
            raise InputError(msg)
        checked.append({**tool, "type": "function", "function": dict(function)})
    return checked


def check_choice(choice: Any, names: Sequence[str]) -> str | None:
    """Return the tool that must be called, `""` for any of them, or `None` if the model is free.

    Args:
        choice: A name, also in the forms of OpenAI; `"any"`, `"required"` or `True`; `"auto"`, `"none"`, `None`.
        names: The tools' names.

    Raises:
        InputError: If the choice names no tool that was given.
    """
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        choice = function.get("name", choice.get("type")) if isinstance(function, Mapping) else function
    if choice is None or choice is False or choice in ("auto", "none"):
        return None
    if names and (choice is True or choice in ("any", "required")):
        return names[0] if len(names) == 1 else ""
    if choice not in names:
        msg = f"tool_choice is {choice!r}; allowed: {', '.join([*names, *(('any',) if names else ()), 'auto', 'none'])}"
        raise InputError(msg)
    return str(choice)
