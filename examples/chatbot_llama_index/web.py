"""The web side: one static page and a small JSON API, for this machine only."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conversation import Conversations, Event, check_question
from fastapi import FastAPI, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from knowledge import MAX_BYTES, Knowledge, allowed_suffixes, check_name, read_text
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prophetkv_rag.errors import ProphetKVError
from prophetkv_rag.text import shown_name

STATIC = Path(__file__).parent / "static"
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}
MAX_BODY = MAX_BYTES + 100_000
DISCONNECT_CHECK_S = 0.5
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

logger = logging.getLogger(__name__)


class Service:
    """What the routes share. The model is loaded while the page is shown already; `problem` says why it could not."""

    def __init__(self) -> None:
        self.phase = "Starting"
        self.problem: str | None = None
        self.notes: list[str] = []
        self.suggestions: list[str] = []
        self.knowledge: Knowledge | None = None
        self.conversations: Conversations | None = None

    def ready(self) -> tuple[Knowledge, Conversations]:
        """Return both parts, or answer 503 while they are not there yet."""
        if self.knowledge is None or self.conversations is None:
            raise HTTPException(503, self.problem or f"Not ready yet: {self.phase}.")
        return self.knowledge, self.conversations


class Question(BaseModel):
    """Body of `POST /api/chat`."""

    question: str
    session: str | None = None
    compare: bool = False


def make_app(service: Service) -> FastAPI:
    """Make the application around a service that may still be starting."""
    app = FastAPI(title="Chat with your documents", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": "The request is malformed."}, 422)

    @app.exception_handler(ProphetKVError)
    async def bad_input(request: Request, error: ProphetKVError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 422)

    @app.get("/api/state")
    def state() -> dict[str, Any]:
        found: dict[str, Any] = {
            "ready": service.conversations is not None,
            "phase": service.phase,
            "problem": service.problem,
            "notes": service.notes,
            "allowed": list(allowed_suffixes()),
            "max_bytes": MAX_BYTES,
        }
        if service.knowledge is not None and service.conversations is not None:
            engine = service.knowledge.engine
            found |= {
                "model": shown_name(Path(engine.model.config._name_or_path).name),
                "ratio": engine.config.recompute_ratio,
                "suggestions": service.suggestions,
                **_listing(service.knowledge),
            }
        return found

    @app.get("/api/sessions/{session}")
    def history(session: str) -> list[dict[str, str]]:
        return service.ready()[1].history(session)

    @app.delete("/api/sessions/{session}")
    def forget(session: str) -> dict[str, bool]:
        service.ready()[1].forget(session)
        return {"forgotten": True}

    @app.post("/api/documents")
    async def upload(file: UploadFile) -> dict[str, Any]:
        knowledge, _ = service.ready()
        name = check_name(file.filename or "")
        text = await run_in_threadpool(read_text, name, await file.read(MAX_BYTES + 1))
        await run_in_threadpool(knowledge.add, name, text)
        return {"added": name, **await run_in_threadpool(_listing, knowledge)}

    @app.delete("/api/documents/{document}")
    def delete(document: str) -> dict[str, Any]:
        knowledge, _ = service.ready()
        try:
            gone = knowledge.delete(document)
        except KeyError:
            raise HTTPException(404, "There is no such document; it may have been deleted already.") from None
        return {"deleted": asdict(gone), **_listing(knowledge)}

    @app.post("/api/chat")
    async def chat(request: Request, body: Question) -> StreamingResponse:
        knowledge, conversations = service.ready()
        question = check_question(body.question)
        if not await run_in_threadpool(knowledge.documents):
            raise HTTPException(409, "There are no documents. Add one, then ask again.")
        session = conversations.session(body.session)
        cancel = threading.Event()
        events = conversations.answer(session, question, compare=body.compare, cancel=cancel)
        return StreamingResponse(
            _server_sent(request, events, cancel), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    app.mount("/", StaticFiles(directory=STATIC, html=True), name="static")
    return app


def _listing(knowledge: Knowledge) -> dict[str, Any]:
    return {"documents": [asdict(document) for document in knowledge.documents()], "caches": knowledge.totals()}


async def _server_sent(request: Request, events: Any, cancel: threading.Event) -> AsyncIterator[str]:
    """Write events as they come; a reader that goes away cancels the answer."""
    end: Any = object()
    step = None
    try:
        while True:
            step = asyncio.ensure_future(run_in_threadpool(next, events, end))
            while not step.done():
                await asyncio.wait({step}, timeout=DISCONNECT_CHECK_S)
                if await request.is_disconnected():
                    return
            event: Event = step.result()
            if event is end:
                return
            yield f"data: {json.dumps(event)}\n\n"  # ASCII: many clients end lines at more than \n
    except ProphetKVError as error:
        yield f"data: {json.dumps({'type': 'error', 'error': str(error)})}\n\n"
    except Exception:
        logger.exception("an answer failed")
        message = "Something went wrong while answering; the terminal says what."
        yield f"data: {json.dumps({'type': 'error', 'error': message})}\n\n"
    finally:
        cancel.set()
        _close_after(step, events)


def _close_after(step: Any, events: Any) -> None:
    """Close a generator once the step of it that may still run in a thread has ended."""

    def close(done: Any) -> None:
        if not done.cancelled():
            done.exception()  # seen
        threading.Thread(target=events.close, daemon=True).start()

    if step is not None:
        step.add_done_callback(close)


class Guard:
    """Refuses what does not come from a page of ours, and bodies that are too large.

    A server on loopback is reachable from every page that the browser shows: hence the host must be this machine's
    (no DNS rebinding), and whoever changes something must be our own page.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        problem = _problem(scope["method"], Headers(scope=scope))
        app = self.app if problem is None else JSONResponse({"error": problem[1]}, problem[0])
        await app(scope, receive, send_guarded)


def _problem(method: str, headers: Headers) -> tuple[int, str] | None:
    host = urlsplit(f"//{headers.get('host', '')}")
    origin = headers.get("origin")
    if host.hostname not in LOCAL_HOSTS:
        return 403, "This chat answers on this machine's own address only."
    if origin is not None and urlsplit(origin).netloc != host.netloc:
        return 403, "The request came from another page."
    if method == "POST" and "content-length" not in headers:
        return 411, "The request does not say how long it is."
    if int(headers.get("content-length", "0")) > MAX_BODY:
        return 413, f"That is too large: {MAX_BYTES // 1_000_000} MB is the most this chat takes."
    return None
