"""A real server for tests: uvicorn in a thread, on a free loopback port, on a tiny model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.server import ServerSettings, create_app
from prophetkv_rag.server.app import Services
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

MODEL_NAME = "tiny"
CHUNKS = list(CORPUS[:4])
FOREVER = 1500


def make_engine(*, remember: bool = False, max_batch: int = 1) -> ProphetKVEngine:
    """An engine that knows no chunks, whose answers end only by their length or a stop string.

    It remembers no conversation, unless told so: tests send the same prompts again. It answers one after the other,
    unless told so: tests say what waits.
    """
    config = ProphetKVConfig(remember=remember, max_batch=max_batch)
    engine = ProphetKVEngine(tiny_llama(initializer_range=0.3), tiny_tokenizer(), config=config)
    engine.end_tokens = frozenset()
    return engine


def messages(*chunks: str, question: str = "How many planes shall be produced?") -> list[dict[str, str]]:
    context = "\n\n".join(chunks)
    return [{"role": "user", "content": f"Context:\n{context}\n\nQuestion: {question}"}]


@dataclass
class Running:
    url: str
    engine: ProphetKVEngine
    services: Services
    server: uvicorn.Server

    @property
    def api(self) -> str:
        return f"{self.url}/v1"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=None, **options)

    def body(self, *chunks: str, question: str = "How many?", **more: Any) -> dict[str, Any]:
        return {"model": MODEL_NAME, "messages": messages(*chunks, question=question), "max_tokens": 8} | more

    def ask(self, **more: Any) -> httpx.Response:
        with self.client() as client:
            return client.post("/v1/chat/completions", json=self.body(**more))

    def ask_about(self, *chunks: str, **more: Any) -> dict[str, Any]:
        with self.client() as client:
            response = client.post("/v1/chat/completions", json=self.body(*chunks, **more))
        assert response.status_code == 200, response.text
        return dict(response.json())

    def is_idle(self) -> bool:
        return not any(queue.num_waiting or queue.num_running for queue in self.services.queues)

    def metric(self, name: str, **labels: str) -> float:
        return self.services.metrics.registry.get_sample_value(name, labels) or 0.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait however long the machine takes; what never comes true ends by pytest's own limit."""
    while not condition():
        time.sleep(0.01)


@contextmanager
def running(engine: ProphetKVEngine, *, grace_s: int = 5, **settings: Any) -> Iterator[Running]:
    app = create_app(engine, ServerSettings(**({"model_name": MODEL_NAME} | settings)))
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, log_level="warning", timeout_graceful_shutdown=grace_s
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", engine, app.state.services, server)
    finally:
        server.should_exit = True
        thread.join()
