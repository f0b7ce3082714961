"""A model's tool calls in LangChain's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import InvalidToolCall
from langchain_core.messages.tool import ToolCall, invalid_tool_call, tool_call

from prophetkv_rag.tools import ToolCall as OurCall


def split_calls(calls: Sequence[OurCall]) -> tuple[list[ToolCall], list[InvalidToolCall], dict[str, Any]]:
    """Return the calls that can be made, those whose arguments are no object, and metadata on one that was cut off.

    That one is no `invalid_tool_calls` entry: LangChain reads those again when chunks are added up, completes their
    JSON, and a tool would be called with half of its arguments.
    """
    good, bad, metadata = [], [], dict[str, Any]()
    for call in calls:
        values = call.values
        if not call.is_whole:
            metadata["cut_off_tool_call"] = {"name": call.name, "args": call.arguments, "id": call.id}
        elif values is not None:
            good.append(tool_call(name=call.name, args=values, id=call.id))
        else:
            error = "the call's arguments are not a JSON object"
            bad.append(invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=error))
    return good, bad, metadata
