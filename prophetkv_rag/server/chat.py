"""`POST /v1/chat/completions`: a request's turn on the engine, and its answer in OpenAI's shapes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from prophetkv_rag.generation import Grammar
from prophetkv_rag.server.conversations import ConversationService
from prophetkv_rag.server.disconnect import EventStream, unless_disconnected
from prophetkv_rag.server.envelope import Answer, Envelope, Piece, next_piece, unless_cancelled
from prophetkv_rag.server.errors import as_api_error, model_not_found
from prophetkv_rag.server.metrics import ServerMetrics
from prophetkv_rag.server.schemas import ChatRequest, ReuseOptions
from prophetkv_rag.server.settings import ServerSettings
from prophetkv_rag.server.work_queue import Ticket, WorkQueue
from prophetkv_rag.tools import ToolRun, response_schema

if TYPE_CHECKING:
    from prophetkv_rag.server.served import ServedEngine

_LEAST_TEMPERATURE = 1e-3
"""Below it, dividing by the temperature may leave the range of floats, and sampling is greedy anyway."""

_LEAST_TOP_P = 1e-6


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
        envelope = Envelope(self.settings.model_name, body)
        if not body.stream:
            try:
                return JSONResponse(envelope.whole(await unless_disconnected(request.receive, _whole(ticket))))
            finally:
                self.queue.give_up(ticket)
        try:
            first = await unless_disconnected(request.receive, next_piece(ticket, self.settings.ping_s))
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
            messages = [message.for_template() for message in body.messages]
            run = self._tool_run(messages, body)
            if run is not None:
                options = {**options, **run.settings, "query": options["query"] or run.settings["query"]}
            pieces = self.engine.stream(
                messages if run is None else run.prompt,
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
                found = run.add(piece) if run is not None else None
                new, calls = (piece.delta, ()) if found is None else (found.text, found.calls)
                if piece.finish_reason is not None:
                    outcome = piece.finish_reason
                    self.metrics.generated_tokens.inc(len(piece.token_ids))
                    text, whole = (piece.text, ()) if run is None else (run.text, run.calls)
                    yield Piece(new, calls, Answer(piece, text, whole))
                elif body.stream:
                    yield Piece(new, calls)
        except Exception as error:
            outcome = as_api_error(error).code or outcome
            raise
        finally:
            self.metrics.requests.labels(outcome).inc()

    def _tool_run(self, messages: list[dict[str, Any]], body: ChatRequest) -> ToolRun | None:
        if not body.tools or body.tool_choice == "none":
            return None
        return ToolRun(
            self.engine.tokens,
            self.engine.chunk_index,
            messages,
            body.tools,
            body.tool_choice,
            parallel=body.parallel_tool_calls is not False,
            answer=response_schema(body.response_format),
        )

    def _options(self, request: Request, body: ChatRequest) -> dict[str, Any]:
        schema = response_schema(body.response_format)
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
            **({"grammar": Grammar.json_schema(schema)} if schema is not None else {}),
            **self.conversations.options(request, ours),
        }


async def _whole(ticket: Ticket[Piece]) -> Answer:
    last = None
    async for piece in ticket:
        last = piece.last
    assert last is not None
    return unless_cancelled(last)
