"""`ProphetKVChromaVectorStore` on real Chroma: what is stored follows the documents, and base-class traps are shut."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import chromadb
import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.vector_stores.chroma import ChromaVectorStore

from prophetkv_rag.chroma import KVCachingCollection
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index import ProphetKVChromaVectorStore, ProphetKVLLM
from tests.integrations.rag import QUESTION, TEXTS, CallLog, HashingEmbedding, build_index


@pytest.fixture(params=["ephemeral", "persistent"])
def store(request: pytest.FixtureRequest, tmp_path: Path, fresh_engine: ProphetKVEngine) -> ProphetKVChromaVectorStore:
    client = chromadb.EphemeralClient() if request.param == "ephemeral" else chromadb.PersistentClient(tmp_path)
    return ProphetKVChromaVectorStore.from_client(client, f"life-{tmp_path.name}", fresh_engine)


def node(text: str, **metadata: Any) -> TextNode:
    return TextNode(text=text, metadata=metadata, embedding=HashingEmbedding()._get_text_embedding(text))


def by_name(value: str | list[str], operator: FilterOperator = FilterOperator.EQ) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key="name", value=value, operator=operator)])


def cached(engine: ProphetKVEngine) -> int:
    return engine.store.stats().chunks


def test_caches_follow_the_documents(store: ProphetKVChromaVectorStore, fresh_engine: ProphetKVEngine) -> None:
    index = build_index(store)
    assert cached(fresh_engine) == 4

    extra = Document(text="A fifth document about saffron, grown near the harbour.", id_="extra")
    index.insert(extra)
    assert cached(fresh_engine) == 5

    index.update_ref_doc(Document(text="The fifth document is about paprika now, not saffron.", id_="extra"))
    assert cached(fresh_engine) == 5
    assert not fresh_engine.chunk_index.find(extra.text), "the old text is forgotten"

    index.delete_ref_doc("extra")
    assert cached(fresh_engine) == 4
    index.delete_ref_doc("no such document")
    assert cached(fresh_engine) == 4

    store.delete_nodes([store.get_nodes(None)[0].node_id])
    assert cached(fresh_engine) == 3
    store.clear()
    assert cached(fresh_engine) == 0
    assert store.get_nodes(None) == []

    build_index(store)
    assert cached(fresh_engine) == 4


def test_a_chunk_stays_cached_while_another_document_has_it(
    store: ProphetKVChromaVectorStore, fresh_engine: ProphetKVEngine
) -> None:
    index = build_index(store, [TEXTS[0], TEXTS[0]])
    assert cached(fresh_engine) == 1
    index.delete_ref_doc("doc-0")
    assert cached(fresh_engine) == 1
    index.delete_ref_doc("doc-1")
    assert cached(fresh_engine) == 0


async def test_async_lifecycle(store: ProphetKVChromaVectorStore, fresh_engine: ProphetKVEngine) -> None:
    nodes = [node(text, name=f"n{i}") for i, text in enumerate(TEXTS)]
    assert await store.async_add(nodes) == [n.node_id for n in nodes]
    assert cached(fresh_engine) == 4
    assert len(await store.aget_nodes()) == 4
    found = await store.aquery(VectorStoreQuery(query_embedding=nodes[2].embedding, similarity_top_k=1))
    assert found.ids == [nodes[2].node_id]
    await store.adelete_nodes([nodes[0].node_id])
    await store.adelete("none such")
    assert cached(fresh_engine) == 3
    await store.aclear()
    assert cached(fresh_engine) == 0


@pytest.mark.parametrize(
    ("name", "twin", "arguments"),
    [
        ("add", "async_add", [[]]),
        ("delete", "adelete", ["doc-0"]),
        ("delete_nodes", "adelete_nodes", [["id"]]),
        ("get_nodes", "aget_nodes", [["id"]]),
        ("query", "aquery", [VectorStoreQuery(query_embedding=[0.1] * 256)]),
        ("clear", "aclear", []),
    ],
)
async def test_async_twins_leave_the_event_loop(
    name: str, twin: str, arguments: list[Any], store: ProphetKVChromaVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    monkeypatch.setattr(
        ProphetKVChromaVectorStore, name, lambda self, *args: threads.append((threading.current_thread(), *args[:1]))
    )
    await getattr(store, twin)(*arguments)
    assert threads[0][0] is not threading.main_thread()
    assert list(threads[0][1:]) == arguments


async def test_index_operations_have_async_twins(
    store: ProphetKVChromaVectorStore, fresh_engine: ProphetKVEngine
) -> None:
    index = await asyncio.to_thread(build_index, store)
    await index.ainsert(Document(text="A fifth document about saffron, grown near the harbour.", id_="extra"))
    assert cached(fresh_engine) == 5
    await index.adelete_ref_doc("extra")
    assert cached(fresh_engine) == 4


def test_calls_that_mean_nothing_do_nothing(store: ProphetKVChromaVectorStore) -> None:
    empty_filters = MetadataFilters(filters=[])
    store.clear()
    store.delete("no such document")
    store.delete_nodes([])
    store.delete_nodes()
    store.delete_nodes([], filters=by_name("n0"))
    assert store.add([]) == []
    assert store.get_nodes([]) == []
    assert store.query(VectorStoreQuery(query_embedding=[0.1] * 256, similarity_top_k=2)).nodes == []
    store.add([node(TEXTS[0], name="n0"), node(TEXTS[1], name="n1")])
    store.delete_nodes([])
    store.delete_nodes()
    store.delete_nodes(filters=empty_filters)
    store.delete_nodes([], filters=by_name("n0"))
    assert store.get_nodes([]) == []
    assert len(store.get_nodes(None)) == 2


def test_filters_choose_what_is_read_and_deleted(
    store: ProphetKVChromaVectorStore, fresh_engine: ProphetKVEngine
) -> None:
    nodes = [node(text, name=f"n{i}", page=i) for i, text in enumerate(TEXTS)]
    store.add(nodes)
    assert [n.text for n in store.get_nodes(None, filters=by_name("n1"))] == [TEXTS[1]]
    either = MetadataFilters(
        filters=[
            MetadataFilter(key="page", value=0),
            MetadataFilter(key="page", value=3, operator=FilterOperator.GTE),
        ],
        condition=FilterCondition.OR,
    )
    assert {n.text for n in store.get_nodes(None, filters=either)} == {TEXTS[0], TEXTS[3]}
    store.delete_nodes([nodes[0].node_id, nodes[1].node_id], filters=by_name("n1"))
    assert {n.text for n in store.get_nodes(None)} == {TEXTS[0], TEXTS[2], TEXTS[3]}
    store.delete_nodes(filters=by_name(["n2", "n3"], FilterOperator.IN))
    assert [n.text for n in store.get_nodes(None)] == [TEXTS[0]]
    assert cached(fresh_engine) == 1


def test_adding_a_known_id_replaces_the_text(store: ProphetKVChromaVectorStore, fresh_engine: ProphetKVEngine) -> None:
    old = node(TEXTS[0], name="old", draft=1)
    store.add([old])
    new = node(TEXTS[1], name="new")
    new.id_ = old.node_id
    store.add([new, node(TEXTS[2], name="other")])
    assert {n.text for n in store.get_nodes(None)} == {TEXTS[1], TEXTS[2]}
    draft = MetadataFilters(filters=[MetadataFilter(key="draft", value=1)])
    assert store.get_nodes(None, filters=draft) == []
    assert store.get_nodes(None, filters=by_name("new"))[0].text == TEXTS[1]
    assert cached(fresh_engine) == 2


def test_adding_the_same_nodes_again_computes_nothing(
    store: ProphetKVChromaVectorStore, fresh_engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [node(text, name=f"n{i}") for i, text in enumerate(TEXTS)]
    store.add(nodes)
    monkeypatch.setattr(fresh_engine.store, "put", None)
    store.add(nodes)
    assert len(store.get_nodes(None)) == cached(fresh_engine) == 4


def test_nothing_of_ours_shows_in_what_is_read(store: ProphetKVChromaVectorStore) -> None:
    store.add([node(TEXTS[0], name="n0", nothing=None), node(TEXTS[1])])
    assert len(store.get_nodes(None, filters=MetadataFilters(filters=[MetadataFilter(key="nothing", value="")]))) == 1
    for found in store.get_nodes(None):
        assert not [key for key in found.metadata if "prophet" in key]
    raw = store.client.get(include=["metadatas"])["metadatas"]
    assert not [key for metadata in raw for key in metadata or {} if "prophet" in key]


def test_mmr_query_reuses_what_it_finds(
    store: ProphetKVChromaVectorStore, fresh_engine: ProphetKVEngine, call_log: CallLog
) -> None:
    index = build_index(store)
    llm = ProphetKVLLM(engine=fresh_engine, max_new_tokens=2)
    query_engine = index.as_query_engine(llm=llm, similarity_top_k=2, vector_store_query_mode=VectorStoreQueryMode.MMR)
    assert len(query_engine.query(QUESTION).source_nodes) == 2
    assert [chunk["status"] for chunk in call_log.chunks] == ["hit", "hit"]


def test_an_existing_collection_is_opened_again(
    tmp_path: Path, fresh_engine: ProphetKVEngine, call_log: CallLog
) -> None:
    client = chromadb.PersistentClient(tmp_path)
    build_index(ProphetKVChromaVectorStore.from_client(client, "town", fresh_engine))
    again = ProphetKVChromaVectorStore.from_client(client, "town", fresh_engine)
    index = VectorStoreIndex.from_vector_store(again, embed_model=HashingEmbedding())
    llm = ProphetKVLLM(engine=fresh_engine, max_new_tokens=2)
    assert len(index.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION).source_nodes) == 3
    assert [chunk["status"] for chunk in call_log.chunks] == ["hit"] * 3


def test_constructors(tmp_path: Path, fresh_engine: ProphetKVEngine) -> None:
    client = chromadb.PersistentClient(tmp_path)
    plain = client.create_collection("plain", embedding_function=None)
    caching = KVCachingCollection(client.create_collection("caching", embedding_function=None), fresh_engine)
    for store in (
        ProphetKVChromaVectorStore(chroma_collection=plain, engine=fresh_engine),
        ProphetKVChromaVectorStore(chroma_collection=caching),
        ProphetKVChromaVectorStore.from_collection(plain, fresh_engine),
        ProphetKVChromaVectorStore.from_params("plain", persist_dir=str(tmp_path), engine=fresh_engine),
    ):
        assert isinstance(store, ChromaVectorStore)
        assert isinstance(store.client, KVCachingCollection)
        assert store.stores_text
        assert store.to_dict()["class_name"] == "ProphetKVChromaVectorStore"
    made = ProphetKVChromaVectorStore.from_client(client, "made", fresh_engine, metadata={"topic": "town"}).client
    assert made.metadata == {"topic": "town"}
    assert made.configuration_json["embedding_function"] is None, "Chroma's default model would be downloaded"
    with pytest.raises(InputError, match="engine is missing"):
        ProphetKVChromaVectorStore(chroma_collection=plain)
    with pytest.raises(InputError, match="from_client"):
        ProphetKVChromaVectorStore(engine=fresh_engine)


def test_storage_context_persists_beside_it(
    tmp_path: Path, fresh_engine: ProphetKVEngine, new_vector_store: Any
) -> None:
    index = build_index(new_vector_store(fresh_engine))
    index.storage_context.persist(tmp_path)
    storage = StorageContext.from_defaults(vector_store=new_vector_store(fresh_engine), persist_dir=str(tmp_path))
    assert storage.vector_store.stores_text


def test_half_a_character_does_not_lose_the_other_nodes(
    store: ProphetKVChromaVectorStore, fresh_engine: ProphetKVEngine
) -> None:
    half = "A page with half a character \ud835 of a damaged PDF."
    store.add([node(TEXTS[0]), TextNode(text=half, metadata={"name": "\udce9"}, embedding=[1.0] * 256)])
    assert cached(fresh_engine) == 2
    assert {found.get_content() for found in store.get_nodes(None)} == {TEXTS[0], half.replace("\ud835", "\ufffd")}
    llm = ProphetKVLLM(engine=fresh_engine, max_new_tokens=2)
    llm.complete(f"{half}\n\nWhat \ud800 is damaged?")
    assert llm.last_report is not None
    assert llm.last_report.reused_tokens > 0
