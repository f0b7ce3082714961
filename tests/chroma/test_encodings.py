"""Through a real Chroma collection: what records and embeddings say about which chunks stand before which."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import chromadb
import pytest

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.chroma import KVCachingCollection
from prophetkv_rag.store import Behind, MemoryStore
from prophetkv_rag.store.disk import open_disk_store
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

TEXTS = list(CORPUS[:5])
NAMES = [f"r{number}" for number in range(5)]
EMBEDDINGS = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.8, 0.2]]
NUMBERS = itertools.count()
NEAREST = [[4, 1], [4, 0], [4, 3], [4, 2], [0, 1]]
"""Of each, its two nearest by cosine, the nearest last; written by hand."""


def collection(encoding: str, **options: Any) -> KVCachingCollection:
    engine = ProphetKVEngine(
        tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(encoding=encoding), store=MemoryStore()
    )
    client = chromadb.EphemeralClient()
    name = f"encodings_{next(NUMBERS)}"
    plain = client.create_collection(name, metadata={"hnsw:space": "cosine"}, embedding_function=None)
    return KVCachingCollection(plain, engine, **options)


def key(caching: KVCachingCollection, text: str) -> str:
    engine = caching.engine
    return engine.identity.key(engine.tokens.chunk(text))


def before(caching: KVCachingCollection, text: str) -> list[str]:
    """The texts that a chunk is encoded behind."""
    by_key = {key(caching, one): one for one in TEXTS}
    found: Behind = caching.engine.store.behind(key(caching, text))
    return [by_key[one] for one in found.keys]


def node(name: str, previous: str | None) -> dict[str, str]:
    relationships = {"1": {"node_id": "doc"}, **({"2": {"node_id": previous}} if previous else {})}
    return {"_node_content": json.dumps({"id_": name, "relationships": relationships}), "ref_doc_id": "doc"}


def test_records_of_one_call_are_one_document_in_order() -> None:
    caching = collection("previous:2")
    caching.add(ids=NAMES, embeddings=EMBEDDINGS, documents=TEXTS)
    assert [before(caching, text) for text in TEXTS] == [TEXTS[max(0, n - 2) : n] for n in range(5)]


def test_langchain_says_the_source_and_the_first_character() -> None:
    caching = collection("previous:2")
    metadatas = [
        {"source": "a", "start_index": 900},
        {"source": "b", "start_index": 0},
        {"source": "a", "start_index": 0},
        {"source": "a", "start_index": 400},
        {"source": "b", "start_index": 300},
    ]
    caching.add(ids=NAMES, embeddings=EMBEDDINGS, documents=TEXTS, metadatas=metadatas)
    assert before(caching, TEXTS[0]) == [TEXTS[2], TEXTS[3]]
    assert before(caching, TEXTS[4]) == [TEXTS[1]]
    assert before(caching, TEXTS[1]) == before(caching, TEXTS[2]) == []


def test_llama_index_says_which_node_is_before_also_one_of_an_earlier_call() -> None:
    caching = collection("previous:2")
    nodes = [node(name, NAMES[n - 1] if n else None) for n, name in enumerate(NAMES)]
    caching.add(ids=NAMES[:3], embeddings=EMBEDDINGS[:3], documents=TEXTS[:3], metadatas=nodes[:3])
    caching.add(ids=NAMES[3:], embeddings=EMBEDDINGS[3:], documents=TEXTS[3:], metadatas=nodes[3:])
    assert [before(caching, text) for text in TEXTS] == [TEXTS[max(0, n - 2) : n] for n in range(5)]


def test_records_without_any_order_are_told_once_and_encoded_alone(caplog: pytest.LogCaptureFixture) -> None:
    caching = collection("previous:2")
    caching.collection.add(ids=NAMES, embeddings=EMBEDDINGS, documents=TEXTS)
    with caplog.at_level(logging.WARNING):
        caching.cache_existing()
        caching.cache_existing()
        assert caplog.text.count("do not say in which order they stand") == 1
        several = collection("previous:2")  # each a document of its own: there is nothing to tell
        several.collection.add(
            ids=NAMES, embeddings=EMBEDDINGS, documents=TEXTS, metadatas=[{"source": name} for name in NAMES]
        )
        several.cache_existing()
    assert caplog.text.count("do not say in which order they stand") == 1
    assert [before(caching, text) for text in TEXTS] == [[]] * 5


def test_a_circle_of_nodes_ends() -> None:
    caching = collection("previous:3")
    nodes = [node("r0", "r1"), node("r1", "r0"), node("r2", "gone")]
    caching.add(ids=NAMES[:3], embeddings=EMBEDDINGS[:3], documents=TEXTS[:3], metadatas=nodes)
    assert before(caching, TEXTS[2]) == []


def test_neighbours_are_the_nearest_records_in_a_thread_after_the_write() -> None:
    caching = collection("neighbours:2")
    caching.add(ids=NAMES, embeddings=EMBEDDINGS, documents=TEXTS)
    caching.encode_behind_neighbours()
    assert [before(caching, text) for text in TEXTS] == [[TEXTS[n] for n in nearest] for nearest in NEAREST]


@pytest.mark.parametrize("in_background", [True, False])
def test_records_that_are_a_whole_document_stand_behind_neighbours_the_others_behind_each_other(in_background) -> None:
    caching = collection("previous:2+neighbours:2", in_background=in_background)
    parts = [node("r0", None), node("r1", "r0"), *({"source": f"{number}"} for number in (2, 3, 4))]
    caching.add(ids=NAMES, embeddings=EMBEDDINGS, documents=TEXTS, metadatas=parts)
    for _ in range(2):
        caching.encode_behind_neighbours()
        nearest = [[TEXTS[n] for n in nearest] for nearest in NEAREST]
        assert [before(caching, text) for text in TEXTS] == [[], [TEXTS[0]], *nearest[2:]]
        caching.cache_existing()


def test_without_a_thread_they_are_encoded_when_that_is_asked_for() -> None:
    caching = collection("neighbours:2", in_background=False)
    caching.add(ids=NAMES, embeddings=EMBEDDINGS, documents=TEXTS)
    assert [before(caching, text) for text in TEXTS] == [[]] * 5
    told: list[tuple[int, int]] = []
    caching.encode_behind_neighbours(lambda done, total: told.append((done, total)))
    assert [before(caching, text) for text in TEXTS] == [[TEXTS[n] for n in nearest] for nearest in NEAREST]
    assert told == [(5, 5)]


def test_new_records_change_no_old_cache_unless_it_is_refreshed() -> None:
    caching = collection("neighbours:1", in_background=False)
    caching.add(ids=NAMES[:3], embeddings=EMBEDDINGS[:3], documents=TEXTS[:3])
    caching.encode_behind_neighbours()
    assert before(caching, TEXTS[2]) == [TEXTS[1]]
    caching.add(ids=NAMES[3:], embeddings=EMBEDDINGS[3:], documents=TEXTS[3:])
    caching.encode_behind_neighbours()
    assert before(caching, TEXTS[2]) == [TEXTS[1]]
    caching.encode_behind_neighbours(refresh=True)
    assert before(caching, TEXTS[2]) == [TEXTS[3]]


def test_a_deleted_neighbour_is_replaced_by_the_next() -> None:
    caching = collection("neighbours:2", in_background=False)
    caching.add(ids=NAMES, embeddings=EMBEDDINGS, documents=TEXTS)
    caching.encode_behind_neighbours()
    caching.delete(ids=["r1"])
    assert key(caching, TEXTS[0]) not in caching.engine.store
    caching.encode_behind_neighbours()
    assert before(caching, TEXTS[0]) == [TEXTS[3], TEXTS[4]]


def test_a_record_without_a_text_is_told_and_the_others_are_encoded(caplog: pytest.LogCaptureFixture) -> None:
    caching = collection("neighbours:2", in_background=False)
    caching.collection.add(ids=["bare"], embeddings=[[0.5, 0.5]])
    caching.add(ids=NAMES, embeddings=EMBEDDINGS, documents=TEXTS)
    with caplog.at_level(logging.WARNING):
        caching.encode_behind_neighbours()
    assert "1 records of collection" in caplog.text
    assert all(before(caching, text) for text in TEXTS)


def test_a_collection_of_one_and_equal_texts() -> None:
    caching = collection("neighbours:3", in_background=False)
    caching.add(ids=["a", "b"], embeddings=EMBEDDINGS[:2], documents=[TEXTS[0], f" {TEXTS[0]}\n"])
    caching.encode_behind_neighbours()
    assert before(caching, TEXTS[0]) == []


def test_what_is_cached_later_has_the_order_that_the_records_say() -> None:
    caching = collection("previous:1")
    nodes = [node(name, NAMES[n - 1] if n else None) for n, name in enumerate(NAMES)]
    caching.collection.add(ids=NAMES[::-1], embeddings=EMBEDDINGS[::-1], documents=TEXTS[::-1], metadatas=nodes[::-1])
    caching.cache_existing()
    assert [before(caching, text) for text in TEXTS] == [[], *([text] for text in TEXTS[:4])]


def test_neighbours_with_a_remote_tier_which_has_the_plain_caches_already(tmp_path: Path) -> None:
    """The second pass replaces what the first has uploaded, and another machine takes that."""

    def opened(name: str) -> KVCachingCollection:
        store = open_disk_store(tmp_path / name, remote=f"file://{tmp_path}/remote")
        config = ProphetKVConfig(encoding="neighbours:2")
        engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=config, store=store)
        plain = chromadb.EphemeralClient().create_collection(
            f"remote_{name}", metadata={"hnsw:space": "cosine"}, embedding_function=None
        )
        return KVCachingCollection(plain, engine, in_background=False)

    caching = opened("first")
    caching.add(ids=NAMES, embeddings=EMBEDDINGS, documents=TEXTS)
    caching.engine.store.flush()
    caching.encode_behind_neighbours()
    assert [before(caching, text) for text in TEXTS] == [[TEXTS[n] for n in nearest] for nearest in NEAREST]
    caching.engine.store.close()

    second = opened("second")
    second.progress = lambda done, total: pytest.fail("a chunk was computed that the remote tier has")
    second.add(ids=NAMES, embeddings=EMBEDDINGS, documents=TEXTS)
    assert [before(second, text) for text in TEXTS] == [[TEXTS[n] for n in nearest] for nearest in NEAREST]
    second.engine.store.close()
