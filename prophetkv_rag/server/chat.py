"""`POST /v1/chat/completions`: a request's turn on the engine, and its answer in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from prophetkv_rag.errors import DeadlineError
from prophetkv_rag.server.conversations import ConversationService
from prophetkv_rag.server.disconnect import EventStream, unless_disconnected
from prophetkv_rag.server.errors import as_api_error, model_not_found, shutting_down
from prophetkv_rag.server.metrics import ServerMetrics
from prophetkv_rag.server.schemas import ChatRequest, ReuseOptions
from prophetkv_rag.server.settings import ServerSettings
from prophetkv_rag.server.work_queue import Ticket, WorkQueue

if TYPE_CHECKING:
    from prophetkv_rag.generation import StreamChunk
    from prophetkv_rag.server.served import ServedEngine

_LEAST_TEMPERATURE = 1e-3
"""Below it, dividing by the temperature may leave the range of floats, and sampling is greedy anyway."""

_LEAST_TOP_P = 1e-6

_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Where many clients end a line (Python's `splitlines`) although event streams do not; JSON escapes the other ones."""


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of an answer; `last` is the engine's last piece. Small, since a slow client lets many of them wait."""

    delta: str
    last: StreamChunk | None = None


@dataclass(frozen=True, slots=True)
class ChatService:
    """Answers chat requests, as many at a time as the engine takes."""

    engine: ServedEngine
    settings: ServerSettings
    queue: WorkQueue
    metrics: ServerMetrics
    conversations: ConversationService

    async def answer(self, request: Request, body: ChatRequest) -> Response:
        """Answer a request; what goes wrong before an answer begins is raised."""
        outcome = "internal_error"
        try:
            if body.model != self.settings.model_name:
                raise model_not_found(body.model, self.settings.model_name)
            ticket = self._submit(body, self._options(request, body))
        except Exception as error:
            outcome = as_api_error(error).code or outcome
            self.metrics.requests.labels(outcome).inc()
            raise
        envelope = _Envelope(self.settings.model_name, body)
        if not body.stream:
            try:
                return JSONResponse(envelope.whole(await unless_disconnected(request.receive, _whole(ticket))))
            finally:
                self.queue.give_up(ticket)
        try:
            first = await unless_disconnected(request.receive, _next(ticket, self.settings.ping_s))
        except BaseException:  # an error, a client that went away, a server that shuts down
            self.queue.give_up(ticket)
            raise
        events = envelope.events(first, ticket, self.settings.ping_s)
        return EventStream(events, on_close=lambda: self.queue.give_up(ticket))

    def _submit(self, body: ChatRequest, options: dict[str, Any]) -> Ticket[Piece]:
        asked = body.prophetkv.deadline_s if body.prophetkv else None
        limits = [seconds for seconds in (asked, self.settings.deadline_s) if seconds is not None]
        return self.queue.submit(
            lambda ticket: self._run(ticket, body, options),
            deadline_s=min(limits, default=None),
            on_dropped=lambda reason: self.metrics.requests.labels(reason).inc(),
        )

    def _run(self, ticket: Ticket[Piece], body: ChatRequest, options: dict[str, Any]) -> Iterator[Piece]:
        """Generate, in the queue's thread."""
        outcome = "internal_error"
        try:
            pieces = self.engine.stream(
                [message.for_template() for message in body.messages],
                cancel=ticket.cancel,
                deadline_s=ticket.seconds_left,
                **options,
            )
            is_first = True
            for piece in pieces:
                if is_first and piece.finish_reason != "cancelled":
                    now = time.monotonic()
                    waited = (ticket.started_at or now) - ticket.created_at
                    self.metrics.count_prefill(piece.report, ttft_s=now - ticket.created_at, waited_s=waited)
                is_first = False
                if piece.finish_reason is not None:
                    outcome = piece.finish_reason
                    self.metrics.generated_tokens.inc(len(piece.token_ids))
                    yield Piece(piece.delta, piece)
                elif body.stream:
                    yield Piece(piece.delta)
        except Exception as error:
            outcome = as_api_error(error).code or outcome
            raise
        finally:
            self.metrics.requests.labels(outcome).inc()

    def _options(self, request: Request, body: ChatRequest) -> dict[str, Any]:
        ours = body.prophetkv or ReuseOptions()
        temperature = body.temperature or 0.0
        return {
            "max_new_tokens": body.max_completion_tokens or body.max_tokens or self.settings.default_max_tokens,
            "stop": body.stop or (),
            "temperature": temperature if temperature >= _LEAST_TEMPERATURE else 0.0,
            "top_p": 1.0 if body.top_p is None else max(body.top_p, _LEAST_TOP_P),
            "seed": body.seed,
            "strategy": ours.strategy,
            "recompute_ratio": ours.recompute_ratio,
            "query": ours.query,
            **self.conversations.options(request, ours),
        }


async def _whole(ticket: Ticket[Piece]) -> StreamChunk:
    last = None
    async for piece in ticket:
        last = piece.last
    assert last is not None
    return _unless_cancelled(last)


def _unless_cancelled(last: StreamChunk) -> StreamChunk:
    """Refuse half an answer: while its client is there, only a shutdown cancels it."""
    if last.finish_reason == "cancelled":
        raise shutting_down()
    return last


async def _next(ticket: Ticket[Piece], timeout_s: float) -> Piece | None:
    """Return the next piece, or `None` if there is none yet."""
    try:
        async with asyncio.timeout(timeout_s):
            return await anext(ticket)
    except DeadlineError:  # a TimeoutError too, but the request's own
        raise
    except TimeoutError:
        return None


class _Envelope:
    """OpenAI's objects around one answer."""

    def __init__(self, model: str, body: ChatRequest) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)

    def whole(self, last: StreamChunk) -> dict[str, Any]:
        message = {"role": "assistant", "content": last.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(last)}
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(last),
            "prophetkv": _reuse(last),
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
                    last = piece.last and _unless_cancelled(piece.last)
                    if piece.delta:
                        yield self._event({"content": piece.delta})
                if last is None:
                    piece = await _next(ticket, ping_s)
        except Exception as error:  # too late for a status
            yield _data(as_api_error(error).body)
            return
        yield self._event({}, finish_reason=_finish_reason(last), prophetkv=_reuse(last))
        if self.with_usage:
            yield _data({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(last)})
        yield "data: [DONE]\n\n"

    def _event(self, delta: dict[str, Any], *, finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self.with_usage else {}
        return _data({**self.head, "object": "chat.completion.chunk", "choices": [choice], **usage, **more})


def _data(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text.translate(_LINE_BREAKS)}\n\n"


def _finish_reason(last: StreamChunk) -> str:
    """OpenAI knows no deadline: an answer that ends before its end has the reason `length`."""
    return "stop" if last.finish_reason == "stop" else "length"


def _usage(last: StreamChunk) -> dict[str, Any]:
    prompt, answer = last.report.prompt_tokens, len(last.token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": last.report.remembered_tokens + last.report.reused_tokens},
    }


def _reuse(last: StreamChunk) -> dict[str, Any]:
    return {**last.report.to_dict(), "finish_reason": last.finish_reason}
