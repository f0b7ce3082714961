"""One answer that may call tools: its prompt, its grammar, and what it says, piece by piece."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from prophetkv_rag.generation import GenerationResult, StreamChunk
from prophetkv_rag.prompt import ChunkIndex, Tokens, plain_messages, question_of
from prophetkv_rag.tools.checks import check_choice, check_tools
from prophetkv_rag.tools.formats import find_tool_format
from prophetkv_rag.tools.grammar import call_grammar
from prophetkv_rag.tools.reading import (
    CallDelta,
    ToolCall,
    ToolPiece,
    WrittenCall,
    read_calls,
    read_unmarked,
    read_words,
    shown_words,
)


class ToolRun:
    """What to ask the engine (`engine.stream(run.prompt, **run.settings)`), and its answer taken apart (`run.add`).

    Args:
        tokens: Renders the prompt.
        chunk_index: Finds the question in it: behind the chunks, which may be a tool's answer.
        messages: Chat messages.
        tools: Tools in OpenAI's form.
        choice: See `check_choice`; `"none"` is the caller's affair, who then shows no tools.
        parallel: Whether several calls may be made; with a tool's name as the choice it is one in any case.
        answer: A JSON schema for an answer without calls.

    Raises:
        InputError: If the model's template shows no tools, or the tools or the choice make no sense.
    """

    def __init__(
        self,
        tokens: Tokens,
        chunk_index: ChunkIndex,
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        choice: Any = None,
        *,
        parallel: bool = True,
        answer: Mapping[str, Any] | None = None,
    ) -> None:
        shown = check_tools(tools)
        self.names = [tool["function"]["name"] for tool in shown]
        forced = check_choice(choice, self.names)
        self._form = find_tool_format(tokens.tokenizer)
        self._tokens = tokens
        grammar = call_grammar(self._form, shown, forced=forced, parallel=parallel and not forced, answer=answer)
        self.prompt = tokens.render(messages, tools=shown)
        self.settings: dict[str, Any] = {
            "grammar": grammar,
            "query": question_of(plain_messages(messages), chunk_index),
        }
        self.text = ""
        self._calls: list[WrittenCall] = []
        self._ids: list[str] = []
        self._is_free = forced is None
        self._most = None if parallel else 1
        self._forgives = forced is None and answer is None

    @property
    def calls(self) -> list[ToolCall]:
        """The calls so far."""
        return [
            ToolCall(identifier, call.name, call.arguments, call.is_whole)
            for identifier, call in zip(self._ids, self._calls, strict=True)
        ]

    def add(self, chunk: StreamChunk | GenerationResult) -> ToolPiece:
        """Take in the next piece of the answer, or all of it; returns what is new."""
        is_last = chunk.finish_reason is not None
        words, calls = self._read(chunk, is_last=is_last)
        text = words[len(self.text) :]
        self.text = words
        deltas = tuple(self._deltas(calls))
        self._calls = calls
        return ToolPiece(text, deltas)

    def finish_reason(self, chunk: StreamChunk | GenerationResult) -> str | None:
        """Return why the answer ended: `"tool_calls"` if that was its aim."""
        return "tool_calls" if chunk.finish_reason == "stop" and self._calls else chunk.finish_reason

    def _read(self, chunk: StreamChunk | GenerationResult, *, is_last: bool) -> tuple[str, list[WrittenCall]]:
        form = self._form
        if form.marker_id in chunk.token_ids:
            at = chunk.token_ids.index(form.marker_id)
            words, source = self._tokens.decode(chunk.token_ids[:at]).rstrip(), self._shown(chunk.token_ids[at + 1 :])
        else:
            words, found = read_words(chunk.text, form)
            if found is None:
                # Nothing held these to a grammar, which would have ended the answer with the first.
                unmarked = read_unmarked(words, self.names)[: self._most] if is_last and self._forgives else []
                shown = words if is_last and not unmarked else shown_words(words, form)
                return (shown if self._is_free else ""), unmarked
            source = found
        # Before a call that is forced stands an empty thought at most.
        return (words if self._is_free else ""), list(read_calls(source, form))

    def _shown(self, token_ids: Sequence[int]) -> str:
        return self._tokens.shown(token_ids).rstrip("\ufffd")  # bytes of a character whose others are to come

    def _deltas(self, calls: Sequence[WrittenCall]) -> list[CallDelta]:
        found = []
        for index, call in enumerate(calls):
            if index >= len(self._ids):
                self._ids.append(uuid.uuid4().hex[:9])  # Mistral's templates take nine characters only
                found.append(CallDelta(index, call.arguments, self._ids[index], call.name))
            elif call.arguments != self._calls[index].arguments:
                found.append(CallDelta(index, call.arguments[len(self._calls[index].arguments) :]))
        return found
