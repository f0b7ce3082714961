"""Chunks behind their nearest neighbours, which any LlamaIndex vector store finds by its nodes' own embeddings."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from llama_index.core.schema import TextNode

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index import with_kv_caches
from tests.integrations.llama_index.stores import KINDS, StoreKind, chroma, qdrant, simple
from tests.integrations.llama_index.test_kv_caches import nodes_of
from tests.integrations.near import BESIDE, NEAR_TEXTS, before, near_engine, nearest
from tests.integrations.rag import chunk_key

HAS_NUMBERS = "`FaissVectorStore`"


@pytest.mark.parametrize("kind", [one for one in KINDS if one.name != HAS_NUMBERS], ids=lambda kind: kind.name)
def test_each_node_stands_behind_what_the_vector_store_finds_nearest(kind: StoreKind, tmp_path: Path) -> None:
    engine = near_engine()
    nodes = nodes_of(*NEAR_TEXTS)
    read = None if kind.keeps_texts else lambda: nodes
    store = with_kv_caches(kind.make(tmp_path), engine, read=read)
    store.add(nodes)
    store._prophetkv_link.neighbours.wait()
    for text in NEAR_TEXTS:
        assert before(engine, text, NEAR_TEXTS) == nearest(text, NEAR_TEXTS)


@pytest.mark.parametrize("make", [simple, chroma, qdrant])
def test_embeddings_that_were_written_before_are_read_back(make, tmp_path: Path) -> None:
    engine = near_engine("neighbours:1")
    nodes = nodes_of(*NEAR_TEXTS)
    plain = make(tmp_path)
    plain.add(nodes)
    bare = [TextNode(id_=node.node_id, text=node.text, metadata=node.metadata) for node in nodes]
    store = with_kv_caches(plain, engine, read=(lambda: bare) if make is simple else None)
    store.cache_existing()
    store.encode_behind_neighbours()
    for text in NEAR_TEXTS:
        assert before(engine, text, NEAR_TEXTS) == nearest(text, NEAR_TEXTS, 1)
    if make is not simple:
        store.add(nodes_of(*NEAR_TEXTS, BESIDE)[-1:])
        store.encode_behind_neighbours(refresh=True)
        assert before(engine, NEAR_TEXTS[1], [*NEAR_TEXTS, BESIDE]) == [BESIDE]


def test_numbers_for_ids_and_texts_kept_elsewhere_are_said(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    [numbers] = [one for one in KINDS if one.name == HAS_NUMBERS]
    engine = near_engine()
    store = with_kv_caches(numbers.make(tmp_path), engine)
    with caplog.at_level(logging.WARNING):
        store.add(nodes_of(*NEAR_TEXTS))
        store._prophetkv_link.neighbours.wait()
    assert "does not say what is near" in caplog.text
    assert all(chunk_key(engine, text) in engine.store for text in NEAR_TEXTS)
    with pytest.raises(InputError, match="does not say what it holds"):
        store.encode_behind_neighbours()
