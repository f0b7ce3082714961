"""What a wrapped LlamaIndex vector store finds begins to load at once, before the prompt is rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_index.core.vector_stores.types import VectorStoreQuery

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.llama_index import with_kv_caches
from tests.integrations.llama_index.stores import KINDS, StoreKind
from tests.integrations.llama_index.test_kv_caches import nodes_of
from tests.integrations.rag import QUESTION, TEXTS, HashingEmbedding, chunk_key


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.strip("`"))
async def test_a_query_begins_to_load_what_it_found(
    kind: StoreKind, fresh_engine: ProphetKVEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a vector store that has the nodes' ids alone; not of one that has numbers for them."""
    nodes = nodes_of(*TEXTS)
    store = with_kv_caches(kind.make(tmp_path), fresh_engine, read=None if kind.keeps_texts else lambda: nodes)
    query = VectorStoreQuery(query_embedding=HashingEmbedding()._get_text_embedding(QUESTION), similarity_top_k=2)
    store.add(nodes)
    ahead: list[Any] = []
    monkeypatch.setattr(fresh_engine.library, "read_ahead", ahead.append)
    found = store.query(query)
    names = [node.node_id for node in found.nodes] if found.nodes else list(found.ids or ())
    keys = {node.node_id: chunk_key(fresh_engine, node.text) for node in nodes}
    has_numbers = kind.name == "`FaissVectorStore`"
    assert len(names) == 2
    assert ahead == [[[] if has_numbers else [keys[name] for name in names]]]
    if "Qdrant" not in kind.name:  # its other client has data of its own here
        ahead.clear()
        await store.aquery(query)
        assert len(ahead) == 1
