"""The ASGI application: routes, errors, and the life of the queues' threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from prophetkv_rag.errors import InputError
from prophetkv_rag.extras import needs

with needs("server", "fastapi", "prometheus_client", what="the server"):
    from fastapi import FastAPI, Query, Request
    from fastapi.responses import Response
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect

from prophetkv_rag.server.chat import ChatService
from prophetkv_rag.server.chunks import ChunkService
from prophetkv_rag.server.conversations import DEFAULT, ConversationService
from prophetkv_rag.server.errors import NO_RETRY, ErrorBoundary, install_handlers, model_not_found
from prophetkv_rag.server.gate import Gate
from prophetkv_rag.server.metrics import ServerMetrics
from prophetkv_rag.server.schemas import ChatRequest, DeleteChunks, Namespace, PutChunks
from prophetkv_rag.server.settings import ServerSettings
from prophetkv_rag.server.work_queue import WorkQueue

if TYPE_CHECKING:
    from prophetkv_rag.server.served import ServedEngine

Handler = TypeVar("Handler", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes use; `app.state.services`."""

    chat: ChatService
    chunks: ChunkService
    conversations: ConversationService
    metrics: ServerMetrics

    @property
    def queues(self) -> tuple[WorkQueue, WorkQueue]:
        """The queue of chats and that of chunks."""
        return self.chat.queue, self.chunks.queue

    def drain(self) -> None:
        """Take no new work and turn away what waits; what runs goes on. Called when a shutdown begins."""
        for queue in self.queues:
            queue.close()


def create_app(engine: ServedEngine, settings: ServerSettings) -> FastAPI:
    """Make the application; it may be mounted in another one. The engine stays the caller's.

    Its threads start and end with its lifespan. Mounted applications get no lifespan: their threads start with the
    first work and end with the process.

    Raises:
        InputError: If the model's tokenizer has no chat template.
    """
    if not engine.has_chat_template:
        msg = f"{settings.model_name} has no chat template, so it cannot answer chats; serve an instruct model"
        raise InputError(msg)
    chat_queue = WorkQueue("chat", max_waiting=settings.max_queue, num_threads=engine.max_concurrent)
    chunk_queue = WorkQueue("chunks", max_waiting=settings.max_queue)
    conversations = ConversationService(
        engine, chunk_queue, has_keys=bool(settings.api_keys), max_bytes=settings.max_conversation_bytes
    )
    metrics = ServerMetrics(engine.store.stats, (chat_queue, chunk_queue), conversations.tier)
    services = Services(
        ChatService(engine, settings, chat_queue, metrics, conversations),
        ChunkService(engine, chunk_queue, conversations),
        conversations,
        metrics,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for queue in services.queues:
            queue.start()
        yield
        for queue in services.queues:
            await asyncio.to_thread(queue.stop)

    # No pages of interactive documentation: they load scripts from other hosts.
    app = FastAPI(title="prophetkv-rag", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.services = services
    app.add_middleware(ErrorBoundary)
    app.add_middleware(
        Gate,
        api_keys=settings.api_keys,
        max_body_bytes=settings.max_body_bytes,
        max_transfer_bytes=settings.max_conversation_bytes,
    )
    if settings.cors_origins:  # outermost: browsers ask without a key, and want to read refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "PUT", "DELETE"),
            allow_headers=("*",),
            expose_headers=(*NO_RETRY, "Retry-After"),
        )
    install_handlers(app)
    _add_routes(app, services, settings)
    return app


def _add_routes(app: FastAPI, services: Services, settings: ServerSettings) -> None:
    model = {"id": settings.model_name, "object": "model", "created": 0, "owned_by": "prophetkv-rag"}

    def get(path: str) -> Callable[[Handler], Handler]:
        """Answer GET, and HEAD, which monitors and load balancers send; servers leave its body out."""

        def add(handler: Handler) -> Handler:
            app.head(path, include_in_schema=False)(handler)
            return app.get(path)(handler)

        return add

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await services.chat.answer(request, body)

    @get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != settings.model_name:
            raise model_not_found(name, settings.model_name)
        return model

    @app.put("/v1/chunks")
    async def put_chunks(body: PutChunks) -> dict[str, Any]:
        return await services.chunks.put(body)

    @app.delete("/v1/chunks")
    async def delete_chunks(body: DeleteChunks) -> dict[str, Any]:
        return await services.chunks.delete(body)

    @get("/v1/chunks")
    async def chunk_stats(namespace: Annotated[Namespace | None, Query()] = None) -> dict[str, Any]:
        return await services.chunks.stats(namespace)

    @app.delete("/v1/conversations")
    async def forget(request: Request, namespace: Annotated[Namespace, Query()] = DEFAULT) -> dict[str, Any]:
        return await asyncio.to_thread(services.conversations.forget, request, namespace)

    @get("/v1/conversations")
    async def save(request: Request, namespace: Annotated[Namespace, Query()] = DEFAULT) -> Response:
        data = await services.conversations.dump(request, namespace)
        return Response(data, media_type="application/octet-stream")

    @app.put("/v1/conversations")
    async def load(request: Request, namespace: Annotated[Namespace, Query()] = DEFAULT) -> dict[str, Any]:
        return await services.conversations.restore(request, namespace, await request.body())

    @get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @get("/metrics")
    async def metrics() -> Response:
        text = await asyncio.to_thread(generate_latest, services.metrics.registry)
        more = getattr(services.chat.engine, "more_metrics", None)  # vLLM's own
        return Response(text if more is None else text + await asyncio.to_thread(more), media_type=CONTENT_TYPE_LATEST)
