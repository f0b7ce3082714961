"""`ProphetKVChroma`: caches keep step with documents, whatever writes and deletes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chromadb
import pytest
from langchain_classic.indexes import SQLRecordManager, aindex, index
from langchain_core.documents import Document

from prophetkv_rag.chroma import open_store
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain import ChatProphetKV, ProphetKVChroma
from tests.integrations.langchain.rag import HashingEmbeddings, new_store
from tests.integrations.rag import TEXTS, chunk_key


def cached(store: ProphetKVChroma) -> set[str]:
    """Keys of the caches that are stored for this collection."""
    engine, proxy = store.engine, store._collection
    keys = set(engine.store.references(proxy.owner))
    assert all(key in engine.store for key in keys)
    return keys


def keys_of(engine: ProphetKVEngine, *texts: str) -> set[str]:
    return {chunk_key(engine, text) for text in texts}


def test_writes_and_deletes(fresh_engine: ProphetKVEngine) -> None:
    store = new_store(fresh_engine)
    ids = store.add_texts(list(TEXTS))
    assert cached(store) == keys_of(fresh_engine, *TEXTS)
    store.update_document(ids[0], Document("A wholly new text about the harbour."))
    assert cached(store) == keys_of(fresh_engine, "A wholly new text about the harbour.", *TEXTS[1:])
    store.delete(ids[:2])
    assert cached(store) == keys_of(fresh_engine, *TEXTS[2:])
    assert store.get()["metadatas"] == [None, None], "our key is not the caller's business"
    store.reset_collection()
    assert cached(store) == set()
    store.add_texts([TEXTS[0]])
    assert cached(store) == keys_of(fresh_engine, TEXTS[0])
    store.delete_collection()
    assert chunk_key(fresh_engine, TEXTS[0]) not in fresh_engine.store
    with pytest.raises(ValueError, match="not initialized"):
        store.similarity_search("harbour")


def test_from_texts_and_documents_take_the_engine(fresh_engine: ProphetKVEngine) -> None:
    client = chromadb.EphemeralClient()
    made = {"client": client, "engine": fresh_engine}
    one = ProphetKVChroma.from_texts([TEXTS[0]], HashingEmbeddings(), collection_name="lc-one", **made)
    two = ProphetKVChroma.from_documents(
        [Document(text) for text in TEXTS[:2]], HashingEmbeddings(), collection_name="lc-two", **made
    )
    assert cached(one) == keys_of(fresh_engine, TEXTS[0])
    one.delete_collection()
    assert cached(two) == keys_of(fresh_engine, *TEXTS[:2]), "what another collection holds stays"
    two.delete_collection()
    with pytest.raises(InputError, match=r"engine=model\.engine"):
        ProphetKVChroma("lc-three", client=client)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("cleanup", [None, "incremental", "full", "scoped_full"])
async def test_the_record_manager_keeps_caches_in_step(
    cleanup: Any, is_async: bool, fresh_engine: ProphetKVEngine
) -> None:
    """Two sources; then one has changed a chunk and lost another, and the second source is gone."""
    store = new_store(fresh_engine)
    records = SQLRecordManager("test", db_url="sqlite:///:memory:")
    records.create_schema()

    async def run(pairs: list[tuple[str, str]]) -> dict[str, int]:
        documents = [Document(text, metadata={"source": source}) for text, source in pairs]
        settings = {"cleanup": cleanup, "source_id_key": "source", "key_encoder": "sha256"}
        if is_async:
            return dict(await aindex(documents, manager, store, **settings))
        return dict(index(documents, records, store, **settings))

    manager: Any = records
    if is_async:
        from langchain_core.indexing import InMemoryRecordManager

        manager = InMemoryRecordManager("test")
    first = await run([(TEXTS[0], "a"), (TEXTS[1], "a"), (TEXTS[2], "b")])
    assert first["num_added"] == 3
    again = await run([(TEXTS[0], "a"), (TEXTS[1], "a"), (TEXTS[2], "b")])
    assert (again["num_added"], again["num_skipped"]) == (0, 3)
    await run([(TEXTS[0], "a"), (TEXTS[3], "a")])
    held = store.get()["documents"]
    assert cached(store) == keys_of(fresh_engine, *held)
    assert (
        set(held)
        == {
            None: set(TEXTS),
            "incremental": {TEXTS[0], TEXTS[3], TEXTS[2]},
            "scoped_full": {TEXTS[0], TEXTS[3], TEXTS[2]},
            "full": {TEXTS[0], TEXTS[3]},
        }[cleanup]
    )
    if cleanup == "full":
        await run([])
        assert store.get()["ids"] == []
        assert cached(store) == set()


def test_a_persistent_store_is_found_again(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    client = chromadb.PersistentClient(str(tmp_path))

    def open_one() -> ProphetKVChroma:
        engine = ProphetKVEngine(
            fresh_engine.model, fresh_engine.tokenizer, config=fresh_engine.config, store=open_store(client)
        )
        return ProphetKVChroma("texts", HashingEmbeddings(), client=client, engine=engine)

    open_one().add_texts(list(TEXTS[:2]))
    again = open_one()
    assert cached(again) == keys_of(fresh_engine, *TEXTS[:2])
    report = again.engine.prefill(f"{TEXTS[0]}\n\nWhy?").report
    assert [chunk.status for chunk in report.chunks] == ["hit"]


def test_a_plain_chroma_collection_can_be_cached_later(fresh_engine: ProphetKVEngine) -> None:
    from langchain_chroma import Chroma

    client = chromadb.EphemeralClient()
    Chroma("lc-plain", HashingEmbeddings(), client=client).add_texts(list(TEXTS))
    store = ProphetKVChroma("lc-plain", HashingEmbeddings(), client=client, engine=fresh_engine)
    assert cached(store) == set()
    store.cache_existing()
    assert cached(store) == keys_of(fresh_engine, *TEXTS)
    store.delete_collection()


def test_half_a_character_does_not_lose_the_other_documents(fresh_engine: ProphetKVEngine) -> None:
    store = new_store(fresh_engine)
    half = "A page with half a character\ud835 of a damaged PDF."
    store.add_documents([Document(half, metadata={"source": "caf\udce9.pdf"}), Document(TEXTS[0])])
    whole = half.replace("\ud835", "\ufffd")
    assert cached(store) == keys_of(fresh_engine, whole, TEXTS[0])
    [found] = store.similarity_search("a damaged PDF", k=1)
    assert (found.page_content, found.metadata) == (whole, {"source": "caf\ufffd.pdf"})
    answer = ChatProphetKV(engine=fresh_engine, max_tokens=2).invoke(f"{half}\n\nWhat \ud800 is damaged?")
    assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
