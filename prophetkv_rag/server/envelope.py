"""OpenAI's objects around one answer: whole, or as the events of a stream."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prophetkv_rag.errors import DeadlineError
from prophetkv_rag.server.errors import as_api_error, shutting_down
from prophetkv_rag.server.schemas import ChatRequest
from prophetkv_rag.server.work_queue import Ticket

if TYPE_CHECKING:
    from prophetkv_rag.generation import StreamChunk
    from prophetkv_rag.tools import CallDelta, ToolCall

_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Where many clients end a line (Python's `splitlines`) although event streams do not; JSON escapes the other ones."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: the engine's last piece, its words, and its calls where tools were at hand."""

    chunk: StreamChunk
    text: str
    calls: Sequence[ToolCall] = ()

    @property
    def finish_reason(self) -> str:
        """OpenAI knows no deadline: an answer that ends before its end has the reason `length`."""
        if self.chunk.finish_reason != "stop":
            return "length"
        return "tool_calls" if self.calls else "stop"

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts."""
        report, answer = self.chunk.report, len(self.chunk.token_ids)
        prompt = report.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": report.remembered_tokens + report.reused_tokens},
        }

    @property
    def reuse(self) -> dict[str, Any]:
        """Our own report."""
        return {**self.chunk.report.to_dict(), "finish_reason": self.chunk.finish_reason}

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message."""
        if not self.calls:
            return {"role": "assistant", "content": self.text, "refusal": None}
        called = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.calls
        ]
        return {"role": "assistant", "content": self.text or None, "refusal": None, "tool_calls": called}


@dataclass(frozen=True, slots=True)
class Piece:
    """New of an answer, small, since a slow client lets many of them wait; the last one has all of it."""

    delta: str
    calls: Sequence[CallDelta] = ()
    last: Answer | None = None


class Envelope:
    """The objects of one answer, which share an id."""

    def __init__(self, model: str, body: ChatRequest) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)

    def whole(self, last: Answer) -> dict[str, Any]:
        """Return the answer to a request without a stream."""
        choice = {"index": 0, "message": last.message, "logprobs": None, "finish_reason": last.finish_reason}
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": last.usage,
            "prophetkv": last.reuse,
        }

    async def events(self, first: Piece | None, ticket: Ticket[Piece], ping_s: float) -> AsyncIterator[str]:
        """Yield the server-sent events of an answer whose first piece may be there already."""
        yield self._event({"role": "assistant", "content": ""})
        piece, last = first, None
        try:
            while last is None:
                if piece is None:
                    yield ": waiting\n\n"  # a comment: clients pass over it
                else:
                    last = piece.last and unless_cancelled(piece.last)
                    if piece.delta:
                        yield self._event({"content": piece.delta})
                    if piece.calls:
                        yield self._event({"tool_calls": [_call_delta(call) for call in piece.calls]})
                if last is None:
                    piece = await next_piece(ticket, ping_s)
        except Exception as error:  # too late for a status
            yield _data(as_api_error(error).body)
            return
        yield self._event({}, finish_reason=last.finish_reason, prophetkv=last.reuse)
        if self.with_usage:
            yield _data({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": last.usage})
        yield "data: [DONE]\n\n"

    def _event(self, delta: dict[str, Any], *, finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self.with_usage else {}
        return _data({**self.head, "object": "chat.completion.chunk", "choices": [choice], **usage, **more})


def unless_cancelled(last: Answer) -> Answer:
    """Refuse half an answer: while its client is there, only a shutdown cancels it."""
    if last.chunk.finish_reason == "cancelled":
        raise shutting_down()
    return last


async def next_piece(ticket: Ticket[Piece], timeout_s: float) -> Piece | None:
    """Return the next piece, or `None` if there is none yet."""
    try:
        async with asyncio.timeout(timeout_s):
            return await anext(ticket)
    except DeadlineError:  # a TimeoutError too, but the request's own
        raise
    except TimeoutError:
        return None


def _call_delta(call: CallDelta) -> dict[str, Any]:
    function = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}


def _data(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text.translate(_LINE_BREAKS)}\n\n"
