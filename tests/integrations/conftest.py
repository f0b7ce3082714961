from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import chromadb
import llama_index.core
import pytest
from llama_index.core.instrumentation import get_dispatcher

from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.llama_index import ProphetKVChromaVectorStore, ProphetKVLLM
from tests.integrations.rag import CallLog, build_index
from tests.tiny import tiny_llama, tiny_tokenizer

MODEL = tiny_llama(initializer_range=0.3, max_position_embeddings=4096)
"""Weights so large that its answers depend on every recomputed token: a lost chunk or question shows."""


def make_engine(*, chat: bool = True, remember: bool = False) -> ProphetKVEngine:
    """An engine with a store of its own on the shared tiny model; it scores by the question alone.

    It remembers no conversation unless told so, as tests send the same prompts again, and each chunk has one cache
    wherever it stands, whatever was asked before.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4096
    if not chat:
        tokenizer.chat_template = None
    config = ProphetKVConfig(query_scope="question", recompute_ratio=0.3, remember=remember, encoding="plain")
    return ProphetKVEngine(MODEL, tokenizer, config=config)


@pytest.fixture(autouse=True)
def own_global_tokenizer() -> Iterator[None]:
    """LlamaIndex counts with a tokenizer of the whole process; what other tests have set must not be counted with."""
    before, llama_index.core.global_tokenizer = llama_index.core.global_tokenizer, None
    yield
    llama_index.core.global_tokenizer = before


@pytest.fixture(scope="session")
def chat_engine() -> ProphetKVEngine:
    return make_engine()


@pytest.fixture(scope="session")
def completion_engine() -> ProphetKVEngine:
    return make_engine(chat=False)


@pytest.fixture
def fresh_engine() -> ProphetKVEngine:
    """An engine whose store holds nothing yet."""
    return make_engine()


@pytest.fixture
def llm(chat_engine: ProphetKVEngine) -> ProphetKVLLM:
    return ProphetKVLLM(engine=chat_engine, max_new_tokens=8)


@pytest.fixture
def call_log() -> Iterator[CallLog]:
    log = CallLog()
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(log)
    yield log
    dispatcher.event_handlers.remove(log)


@pytest.fixture
def new_vector_store() -> Callable[[ProphetKVEngine], ProphetKVChromaVectorStore]:
    """Makes vector stores on collections that no other test uses."""
    client = chromadb.EphemeralClient()

    def make(engine: ProphetKVEngine) -> ProphetKVChromaVectorStore:
        return ProphetKVChromaVectorStore.from_client(client, f"test-{uuid.uuid4().hex}", engine)

    return make


@pytest.fixture(scope="session")
def indexes(chat_engine: ProphetKVEngine, completion_engine: ProphetKVEngine) -> dict[tuple[bool, bool], Any]:
    """The corpus indexed for {chat, completion} x {with, without metadata}; keys are (chat, metadata)."""
    client = chromadb.EphemeralClient()
    built = {}
    for chat, engine in ((True, chat_engine), (False, completion_engine)):
        for has_metadata in (True, False):
            name = f"corpus-{uuid.uuid4().hex}"
            store = ProphetKVChromaVectorStore.from_client(client, name, engine)
            metadata = {"file_name": "town.md", "page": 3} if has_metadata else {}
            built[chat, has_metadata] = build_index(store, **metadata)
    return built


@pytest.fixture
def forwards(chat_engine: ProphetKVEngine) -> Iterator[list[int]]:
    """Numbers of the model's passes, in the shared model of all engines here."""
    begun: list[int] = []
    hook = chat_engine.model.model.layers[0].register_forward_pre_hook(lambda *_: begun.append(len(begun) + 1))
    yield begun
    hook.remove()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards wait for all calls that will be back, so that what shares one does not hang on the machine's load."""
    monkeypatch.setattr("prophetkv_rag.generation.turns.PATIENCE", 1e9)
    monkeypatch.setattr("prophetkv_rag.generation.turns.PATIENCE_S", 60.0)


@pytest.fixture
async def turns(chat_engine: ProphetKVEngine) -> AsyncIterator[list[int]]:
    """Every pass of the model waits until the event loop has turned, which a blocked one never does; notes it."""
    loop, seen = asyncio.get_running_loop(), list[int]()

    def wait_for_a_turn(*_: Any) -> None:
        has_turned = threading.Event()
        loop.call_soon_threadsafe(has_turned.set)
        assert has_turned.wait(300), "the model runs while the event loop is blocked"
        seen.append(len(seen) + 1)

    hook = chat_engine.model.model.layers[0].register_forward_pre_hook(wait_for_a_turn)
    yield seen
    hook.remove()


@contextmanager
def cancelled_at(forward: int, engine: ProphetKVEngine, task: asyncio.Task[Any]) -> Iterator[None]:
    """Cancel the task during the model's `forward`-th pass from now, which ends when the task has."""
    loop, is_over, begun = asyncio.get_running_loop(), threading.Event(), list[int]()
    task.add_done_callback(lambda _: is_over.set())

    def cancel(*_: Any) -> None:
        begun.append(1)
        if len(begun) == forward:
            loop.call_soon_threadsafe(task.cancel)
            assert is_over.wait(300), "who cancels has to wait for the model"

    hook = engine.model.model.layers[0].register_forward_pre_hook(cancel)
    try:
        yield
    finally:
        hook.remove()


def stream_threads() -> list[threading.Thread]:
    """The threads in which async calls run the model."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("prophetkv-stream")]


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until this is so, however long the machine takes."""
    while not condition():
        await asyncio.sleep(0.001)
