"""What a wrapped LangChain vector store finds begins to load at once, before the prompt is rendered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from prophetkv_rag import Prompt
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.langchain import with_kv_caches
from prophetkv_rag.store.disk.store import DiskStore
from tests.integrations.langchain.rag import HashingEmbeddings
from tests.integrations.langchain.stores import KINDS, StoreKind
from tests.integrations.rag import QUESTION, TEXTS, chunk_key
from tests.tiny import tiny_llama, tiny_tokenizer

SEARCHES: dict[str, Callable[[Any], Any]] = {
    "similarity_search": lambda store: store.similarity_search(QUESTION, k=2),
    "with scores": lambda store: store.similarity_search_with_score(QUESTION, k=2),
    "by vector": lambda store: store.similarity_search_by_vector(HashingEmbeddings().embed_query(QUESTION), k=2),
    "retriever": lambda store: store.as_retriever(search_kwargs={"k": 2}).invoke(QUESTION),
    "mmr": lambda store: store.as_retriever(search_type="mmr", search_kwargs={"k": 2}).invoke(QUESTION),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.strip("`"))
async def test_every_search_begins_to_load_what_it_found_once(
    kind: StoreKind, fresh_engine: ProphetKVEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its methods calls which other."""
    store = with_kv_caches(kind.make(tmp_path, HashingEmbeddings()), fresh_engine)
    store.add_documents([Document(text, metadata={"n": number}) for number, text in enumerate(TEXTS)])
    ahead: list[Any] = []
    monkeypatch.setattr(fresh_engine.library, "read_ahead", ahead.append)

    def check(found: Any) -> None:
        texts = [(one[0] if isinstance(one, tuple) else one).page_content for one in found]
        assert len(texts) == 2
        assert ahead == [[[chunk_key(fresh_engine, text) for text in texts]]]
        ahead.clear()

    num_run = 0
    for search in SEARCHES.values():
        try:
            found = search(store)
        except NotImplementedError:
            continue
        check(found)
        num_run += 1
    assert num_run >= 2  # DuckDB has no others
    check(await store.as_retriever(search_kwargs={"k": 2}).ainvoke(QUESTION))


async def test_an_awaited_search_leaves_the_event_loop(
    fresh_engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are made of tokens, and the store's catalog is a file."""
    store = with_kv_caches(InMemoryVectorStore(HashingEmbeddings()), fresh_engine)
    store.add_documents([Document(text) for text in TEXTS])
    threads: list[int] = []
    monkeypatch.setattr(fresh_engine.library, "read_ahead", lambda rows: threads.append(threading.get_ident()))
    assert len(await store.asimilarity_search(QUESTION, k=2)) == 2
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


def test_what_was_found_is_in_ram_when_the_prompt_comes(tmp_path: Path) -> None:
    model, plain = tiny_llama(), InMemoryVectorStore(HashingEmbeddings())
    engine = ProphetKVEngine(model, tiny_tokenizer(), store=DiskStore(tmp_path))
    with_kv_caches(plain, engine, name="docs").add_documents([Document(text) for text in TEXTS])
    engine.store.close()
    engine = ProphetKVEngine(model, tiny_tokenizer(), store=DiskStore(tmp_path))  # as another process finds it
    found = with_kv_caches(plain, engine, name="docs").similarity_search(QUESTION, k=2)
    engine.store.flush()
    for blob in (tmp_path / "blobs").rglob("*.safetensors"):
        blob.unlink()
    texts = [document.page_content for document in found]
    assert [one.status for one in engine.prefill(Prompt("Read: ", texts, QUESTION)).report.chunks] == ["hit", "hit"]
    left = [text for text in TEXTS if text not in texts]
    assert {one.status for one in engine.prefill(Prompt("Read: ", left, QUESTION)).report.chunks} == {"miss"}


def test_a_search_does_not_fail_for_it(fresh_engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(rows: Any) -> None:
        raise OSError

    store = with_kv_caches(InMemoryVectorStore(HashingEmbeddings()), fresh_engine)
    store.add_documents([Document(text) for text in TEXTS])
    monkeypatch.setattr(fresh_engine.library, "read_ahead", fails)
    assert len(store.similarity_search(QUESTION, k=2)) == 2
