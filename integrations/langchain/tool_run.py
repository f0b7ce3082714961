"""One call with tools: the prompt that shows them, and the answer taken apart while it comes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain.tool_calls import Answer, is_complete, read_answer, shown_part
from prophetkv_rag.integrations.langchain.tool_format import find_tool_format

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.generation import StreamChunk


class ToolRun:
    """State of one answer.

    A forced choice (`"any"` or a tool's name) is forced by beginning the answer for the model: it goes on behind the
    opening of a call (up to the arguments if only one tool can be meant), and is stopped when its JSON is complete.

    Args:
        engine: Renders the prompt; finds the question in it.
        messages: Template messages.
        tools: Tool descriptions in OpenAI's form.
        choice: As in `ChatProphetKV.bind_tools`.
    """

    def __init__(
        self, engine: ProphetKVEngine, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], choice: Any
    ) -> None:
        from prophetkv_rag.prompt import question_of

        self.format = find_tool_format(engine.tokenizer)
        self.names = [tool["function"]["name"] for tool in tools]
        self.messages = messages
        self.question = question_of(messages, engine.chunk_index)
        rendered = engine.library.tokens.render(messages, tools=tools)
        forced = check_choice(choice, self.names)
        self.start = "" if forced is None else self._forced_start(tools, forced)
        self.prompt = rendered + self.start
        self.is_done = False
        self._text = ""
        self._shown = ""

    def _forced_start(self, tools: Sequence[dict[str, Any]], name: str) -> str:
        if not name:
            return self.format.forced_start(None)
        parameters = tools[self.names.index(name)]["function"].get("parameters") or {}
        return self.format.forced_start(name, has_arguments=bool(parameters.get("required")))

    def add(self, chunk: StreamChunk) -> str:
        """Take in the next piece of the answer; returns the new text that is no part of a tool call."""
        self._text = self._marked_start + chunk.text
        is_whole = bool(self.start) and "}" in chunk.delta and is_complete(self._text)
        self.is_done = is_whole or chunk.finish_reason is not None
        text = self.answer.text if self.is_done else shown_part(self._text, self.format)
        delta = text[len(self._shown) :]
        self._shown = text
        return delta

    @property
    def answer(self) -> Answer:
        """The answer so far, taken apart."""
        return read_answer(self._text, self.format, self.names)

    @property
    def _marked_start(self) -> str:
        """The forced start as the model's own decoded text would show it."""
        return self.format.marker + self.start[len(self.format.opening) :] if self.start else ""


def check_choice(choice: Any, names: Sequence[str]) -> str | None:
    """Return the tool that must be called, `""` for any of several, or `None` if the model is free.

    Raises:
        InputError: If the choice names no tool that was given.
    """
    if isinstance(choice, dict):
        choice = choice.get("function", choice).get("name", choice.get("type"))
    if choice is None or choice is False or choice in ("auto", "none"):
        return None
    if choice is True or choice in ("any", "required"):
        return names[0] if len(names) == 1 else ""
    if choice not in names:
        msg = f"tool_choice is {choice!r}; allowed: {', '.join(names)}, any, auto, none"
        raise InputError(msg)
    return str(choice)
