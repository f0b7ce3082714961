"""Chunks behind their nearest neighbours, which any LangChain vector store finds by its own search."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain import with_kv_caches
from prophetkv_rag.vector_stores import Record, neighbours
from tests.integrations.langchain.minimal import MinimalStore
from tests.integrations.langchain.rag import HashingEmbeddings
from tests.integrations.langchain.stores import KINDS, StoreKind
from tests.integrations.near import BESIDE, NEAR_TEXTS, before, near_engine, nearest
from tests.integrations.rag import chunk_key

IDS = [f"{number}0000000-0000-4000-8000-000000000000" for number in range(9)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.strip("`"))
def test_each_document_stands_behind_what_the_vector_store_finds_nearest(kind: StoreKind, tmp_path: Path) -> None:
    engine = near_engine()
    store = with_kv_caches(kind.make(tmp_path, HashingEmbeddings()), engine)
    store.add_documents([Document(text) for text in NEAR_TEXTS], ids=IDS[: len(NEAR_TEXTS)])
    store.encode_behind_neighbours()
    for text in NEAR_TEXTS:
        assert before(engine, text, NEAR_TEXTS) == nearest(text, NEAR_TEXTS)


@pytest.mark.parametrize("kind", KINDS[:4], ids=lambda kind: kind.name.strip("`"))
async def test_what_is_deleted_stands_before_nothing_and_the_next_takes_its_place(
    kind: StoreKind, tmp_path: Path
) -> None:
    engine = near_engine()
    store = with_kv_caches(kind.make(tmp_path, HashingEmbeddings()), engine)
    await store.aadd_documents([Document(text) for text in NEAR_TEXTS], ids=IDS[: len(NEAR_TEXTS)])
    await store.aencode_behind_neighbours()
    gone = nearest(NEAR_TEXTS[1], NEAR_TEXTS)[-1]
    await store.adelete([IDS[NEAR_TEXTS.index(gone)]])
    assert chunk_key(engine, NEAR_TEXTS[1]) not in engine.store
    await store.aencode_behind_neighbours()
    left = [text for text in NEAR_TEXTS if text != gone]
    assert before(engine, NEAR_TEXTS[1], left) == nearest(NEAR_TEXTS[1], left)


def test_new_documents_change_no_old_cache_unless_it_is_refreshed() -> None:
    engine = near_engine("neighbours:1")
    store = with_kv_caches(InMemoryVectorStore(HashingEmbeddings()), engine)
    store.add_texts(NEAR_TEXTS)
    store.encode_behind_neighbours()
    store.add_texts([BESIDE])
    store.encode_behind_neighbours()
    texts = [*NEAR_TEXTS, BESIDE]
    assert before(engine, BESIDE, texts) == nearest(BESIDE, texts, 1)
    assert before(engine, NEAR_TEXTS[1], texts) == nearest(NEAR_TEXTS[1], NEAR_TEXTS, 1) != [BESIDE]
    store.encode_behind_neighbours(refresh=True)
    assert before(engine, NEAR_TEXTS[1], texts) == nearest(NEAR_TEXTS[1], texts, 1) == [BESIDE]


def test_what_was_written_before_the_wrapper() -> None:
    engine = near_engine()
    plain = InMemoryVectorStore(HashingEmbeddings())
    plain.add_texts(NEAR_TEXTS)
    store = with_kv_caches(plain, engine)
    store.cache_existing()
    store.encode_behind_neighbours()
    for text in NEAR_TEXTS:
        assert before(engine, text, NEAR_TEXTS) == nearest(text, NEAR_TEXTS)


def test_what_changed_before_its_turn_came_is_taken_as_it_is_now() -> None:
    store = with_kv_caches(InMemoryVectorStore(HashingEmbeddings()), near_engine())
    link = store._prophetkv_link
    store.add_documents([Document(NEAR_TEXTS[0])], ids=["a"])
    store.add_documents([Document(BESIDE)], ids=["a"])
    written = {"a": Record("a", NEAR_TEXTS[0], None)}
    assert [one.text for one in link._near(["a"], written).place(["a"])[0]] == [BESIDE]
    store.delete(["a"])
    assert link._near(["a"], written).place(["a"]) == ([], 0)


def test_a_large_write_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many parts it is encoded in."""
    monkeypatch.setattr(neighbours, "BATCH", 2)
    store = with_kv_caches(InMemoryVectorStore(HashingEmbeddings()), near_engine())
    link = store._prophetkv_link
    made, looked = link.engine.key_of, list[str]()
    monkeypatch.setattr(link.engine, "key_of", lambda text: looked.append(text) or made(text))
    store.add_texts(NEAR_TEXTS)
    link.neighbours.wait()
    assert sorted(looked) == sorted(NEAR_TEXTS)


def test_one_that_cannot_be_read_or_searched_says_so(caplog: pytest.LogCaptureFixture) -> None:
    engine = near_engine()
    store = with_kv_caches(MinimalStore(), engine)
    with caplog.at_level(logging.WARNING):
        store.add_texts(NEAR_TEXTS[:3])
        with pytest.raises(InputError, match="read="):
            store.encode_behind_neighbours()
    assert all(chunk_key(engine, text) in engine.store for text in NEAR_TEXTS[:3])
