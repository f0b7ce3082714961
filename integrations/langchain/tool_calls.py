"""A model's tool calls in LangChain's words."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.messages import InvalidToolCall
from langchain_core.messages.tool import ToolCall, invalid_tool_call, tool_call

from prophetkv_rag.tools import ToolCall as OurCall


def split_calls(calls: Sequence[OurCall]) -> tuple[list[ToolCall], list[InvalidToolCall]]:
    """Return the calls that can be made, and those that the answer's end cut off or whose arguments are no object."""
    good, bad = [], []
    for call in calls:
        values = call.values
        if values is not None:
            good.append(tool_call(name=call.name, args=values, id=call.id))
        else:
            what = "the call's arguments are not a JSON object" if call.is_whole else "the call was cut off"
            bad.append(invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=what))
    return good, bad
