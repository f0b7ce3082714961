"""Fixtures of the Chroma tests: a collection of each kind of client behind the proxy, on a real engine."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromadb
import pytest

from prophetkv_rag.chroma import KVCachingCollection
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.store.memory import MemoryStore
from tests.chroma.clients import chroma_server
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="session")
def http_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Any]]:
    with chroma_server(tmp_path_factory.mktemp("server")) as make_client:
        yield make_client


@pytest.fixture(params=["persistent", "ephemeral", "http"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "persistent":
        return chromadb.PersistentClient(tmp_path / "chroma")
    if request.param == "ephemeral":
        return chromadb.EphemeralClient()
    return request.getfixturevalue("http_client")()


@pytest.fixture(scope="session")
def one_engine() -> ProphetKVEngine:
    return ProphetKVEngine(tiny_llama(), tiny_tokenizer())


@pytest.fixture
def caching_engine(one_engine: ProphetKVEngine) -> ProphetKVEngine:
    """An engine that knows no chunks, on an empty store in memory."""
    store = one_engine.store
    assert isinstance(store, MemoryStore)
    store.delete({*store._chunks, *store._owners})
    for key in list(one_engine.chunk_index._digests):
        one_engine.chunk_index.remove(key)
    return one_engine


@pytest.fixture
def collection(client: Any, caching_engine: ProphetKVEngine) -> KVCachingCollection:
    plain = client.create_collection(f"test-{uuid.uuid4()}", embedding_function=None)
    return KVCachingCollection(plain, caching_engine)
