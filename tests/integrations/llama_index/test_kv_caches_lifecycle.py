"""`with_kv_caches` around LlamaIndex: indexes, pipelines and copies as before, and caches that follow what they do."""

from __future__ import annotations

import asyncio
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index import AlteredTextCache, ProphetKVLLM, with_kv_caches
from prophetkv_rag.store.disk.store import DiskStore
from tests.integrations.llama_index.stores import chroma, qdrant
from tests.integrations.llama_index.test_kv_caches import node, nodes_of
from tests.integrations.rag import TEXTS, HashingEmbedding, build_index, chunk_key
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

A, B, C, D = TEXTS
NEW = "A wholly new text about the harbour and the boats of the town."


def link_of(store: Any) -> Any:
    return store._prophetkv_link


def check(store: Any, *texts: str) -> None:
    """The store's caches are those of these texts, and no others."""
    link = link_of(store)
    keys = {chunk_key(link.engine, text) for text in texts}
    assert set(link.engine.store.references(link.owner)) == keys
    assert all(key in link.engine.store for key in keys)
    assert link.engine.store.stats().chunks == len(keys)


class Failing(SimpleVectorStore):
    """Writes one node after the other, and cannot write texts that say so."""

    def add(self, nodes: Any, **kwargs: Any) -> list[str]:
        for one in nodes:
            if "factory" in one.text:
                msg = "disk full"
                raise OSError(msg)
            super().add([one])
        return [one.node_id for one in nodes]


def test_a_write_that_fails_half_way_keeps_the_caches_of_what_was_written(fresh_engine: ProphetKVEngine) -> None:
    store = with_kv_caches(Failing(), fresh_engine)
    with pytest.raises(OSError, match="disk full"):
        store.add(nodes_of(A, B, C, D))
    assert len(store.data.embedding_dict) == 2
    check(store, A, B)


def test_a_known_id_is_what_the_vector_store_makes_of_it(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    """LlamaIndex's Chroma keeps the old text, Qdrant takes the new one."""
    for make, text in ((chroma, A), (qdrant, NEW)):
        store = with_kv_caches(make(tmp_path), fresh_engine)
        store.add([node(1, A)])
        store.add([node(1, NEW)])
        check(store, text)
        store.clear()


def by_number(value: int, operator: FilterOperator = FilterOperator.EQ) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key="n", value=value, operator=operator)])


def test_deletes_by_filters(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    store = with_kv_caches(qdrant(tmp_path), fresh_engine)
    store.add(nodes_of(*TEXTS))
    store.delete_nodes(filters=by_number(2, FilterOperator.GT))
    check(store, A, B)


def test_deletes_by_ids_and_filters(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    store = with_kv_caches(chroma(tmp_path), fresh_engine)
    store.add(nodes_of(A, B, C))
    store.delete_nodes([node(1, A).node_id, node(2, B).node_id], filters=by_number(1))
    check(store, B, C)
    with pytest.raises(ValueError, match="non-empty"):  # LlamaIndex's own trouble with filters alone
        store.delete_nodes(filters=by_number(2))
    check(store, B, C)


def test_deletes_of_nothing_and_of_everything_are_the_vector_stores_own(fresh_engine: ProphetKVEngine) -> None:
    store = with_kv_caches(SimpleVectorStore(), fresh_engine)
    store.add(nodes_of(*TEXTS))
    store.delete_nodes([])
    store.delete("no such document")
    check(store, *TEXTS)
    store.delete_nodes()  # which deletes all of a SimpleVectorStore
    assert store.data.embedding_dict == {}
    check(store)


@pytest.mark.parametrize("style", ["sync", "async"])
@pytest.mark.parametrize("strategy", list(DocstoreStrategy))
async def test_docstore_strategies_keep_caches_in_step(
    strategy: DocstoreStrategy, style: str, fresh_engine: ProphetKVEngine
) -> None:
    store = with_kv_caches(SimpleVectorStore(), fresh_engine)
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(), HashingEmbedding()],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=strategy,
    )
    assert pipeline.vector_store is store

    async def run(**texts: str) -> None:
        documents = [Document(text=text, id_=name) for name, text in texts.items()]
        if style == "sync":
            pipeline.run(documents=documents)
        else:
            await pipeline.arun(documents=documents)

    await run(a=A, b=B, c=C)
    await run(a=A, b=NEW)
    left = {
        DocstoreStrategy.UPSERTS: {A, NEW, C},
        DocstoreStrategy.UPSERTS_AND_DELETE: {A, NEW},
        DocstoreStrategy.DUPLICATES_ONLY: {A, B, NEW, C},
    }[strategy]
    check(store, *left)


async def test_async_twins_leave_the_event_loop(fresh_engine: ProphetKVEngine, turns: list[int]) -> None:
    """Every pass of the model waits for a turn of the event loop."""
    store = with_kv_caches(SimpleVectorStore(), fresh_engine)
    index = await asyncio.to_thread(build_index, store)
    await index.ainsert(Document(text=NEW, id_="extra"))
    check(store, *TEXTS, NEW)
    await index.adelete_ref_doc("extra")
    check(store, *TEXTS)
    await store.aclear()
    check(store)
    assert turns


def test_a_persisted_index_is_loaded_again(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    index = build_index(with_kv_caches(SimpleVectorStore(), fresh_engine))
    index.storage_context.persist(tmp_path)
    store = with_kv_caches(SimpleVectorStore, fresh_engine).from_persist_dir(str(tmp_path))
    assert isinstance(store, SimpleVectorStore)
    storage = StorageContext.from_defaults(vector_store=store, persist_dir=str(tmp_path))
    again = load_index_from_storage(storage, embed_model=HashingEmbedding())
    again.delete_ref_doc("doc-0")
    assert len(store.data.embedding_dict) == 3


def test_texts_that_lie_in_the_docstore(fresh_engine: ProphetKVEngine) -> None:
    plain = SimpleVectorStore()
    index = build_index(plain)
    store = with_kv_caches(plain, fresh_engine)
    store.cache_existing()
    check(store)
    store = with_kv_caches(plain, fresh_engine, read=lambda: index.docstore.docs.values())
    store.cache_existing()
    check(store, *TEXTS)
    plain.delete("doc-0")  # the docstore has it still
    store.cache_existing()
    check(store, *TEXTS[1:])


def test_copies_and_pickles(fresh_engine: ProphetKVEngine) -> None:
    plain = SimpleVectorStore()
    store = with_kv_caches(plain, fresh_engine)
    store.add(nodes_of(A, B))
    assert store.class_name() == "SimpleVectorStore"
    assert store.to_dict() == plain.to_dict() != SimpleVectorStore().to_dict()
    assert store.model_dump() == plain.model_dump()
    shallow, deep = store.model_copy(), copy.deepcopy(store)
    assert link_of(shallow) is link_of(store)
    assert link_of(deep).owner != link_of(store).owner
    store.clear()
    check(deep, A, B)
    deep.delete_nodes([nodes_of(A)[0].node_id])
    check(deep, B)
    loaded = pickle.loads(pickle.dumps(deep))
    assert isinstance(loaded, SimpleVectorStore)
    assert list(loaded.data.embedding_dict) == list(deep.data.embedding_dict)
    with pytest.raises(InputError, match="unpickled"):
        loaded.add(nodes_of(C))


def test_what_is_refused(fresh_engine: ProphetKVEngine, new_vector_store: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give a BasePydanticVectorStore"):
        with_kv_caches(HashingEmbedding(), fresh_engine)
    with pytest.raises(InputError, match="by itself"):
        with_kv_caches(new_vector_store(fresh_engine), fresh_engine)
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), store=DiskStore(tmp_path))
    with pytest.raises(InputError, match="name="):
        with_kv_caches(SimpleVectorStore(), engine)
    for make, kind in ((qdrant, "QdrantVectorStore"), (chroma, "ChromaVectorStore")):
        assert link_of(with_kv_caches(make(tmp_path), engine)).name.startswith(f"{kind} t")
    engine.store.close()


def test_altered_texts_go_with_their_documents(fresh_engine: ProphetKVEngine) -> None:
    store = with_kv_caches(SimpleVectorStore(), fresh_engine)
    index = build_index(store)
    llm = ProphetKVLLM(engine=fresh_engine, max_new_tokens=2)
    with AlteredTextCache(llm) as altered:
        nodes = index.as_retriever(similarity_top_k=1).retrieve(A)
        nodes[0].node.set_content(NEW)
        altered.see(nodes)
        assert fresh_engine.chunk_index.find(NEW)
        index.delete_ref_doc(nodes[0].node.ref_doc_id)
        assert not fresh_engine.chunk_index.find(NEW)


@pytest.mark.parametrize("make", [lambda _: SimpleVectorStore(), qdrant])
def test_nodes_stand_behind_those_of_their_document_and_an_update_follows(make: Any, tmp_path: Path) -> None:
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(encoding="previous:2"))
    store = with_kv_caches(make(tmp_path), engine)
    splitter = SentenceSplitter(chunk_size=40, chunk_overlap=0)
    documents = [Document(text=text_of(120, seed=seed), id_=str(seed)) for seed in (1, 2)]
    index = VectorStoreIndex.from_documents(
        documents,
        transformations=[splitter],
        embed_model=HashingEmbedding(),
        storage_context=StorageContext.from_defaults(vector_store=store),
    )

    def check_order(document: Document) -> None:
        keys = [chunk_key(engine, one.text) for one in splitter.get_nodes_from_documents([document])]
        assert len(keys) >= 3
        for number, key in enumerate(keys):
            assert engine.store.behind(key).keys == tuple(keys[max(0, number - 2) : number])

    for document in documents:
        check_order(document)
    changed = Document(text="It begins otherwise. " + text_of(100, seed=3), id_="1")
    index.update_ref_doc(changed)
    check_order(changed)
    check_order(documents[1])


def test_a_node_stands_behind_one_that_was_written_before(tmp_path: Path) -> None:
    """The node before it is not in the same call: it is read from the vector store."""
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(encoding="previous:1"))
    store = with_kv_caches(qdrant(tmp_path), engine)
    nodes = SentenceSplitter(chunk_size=40, chunk_overlap=0).get_nodes_from_documents([Document(text=text_of(120))])
    for one in nodes:
        one.embedding = HashingEmbedding()._get_text_embedding(one.text)
        store.add([one])
    keys = [chunk_key(engine, one.text) for one in nodes]
    assert [engine.store.behind(key).keys for key in keys[1:]] == [(key,) for key in keys[:-1]]
