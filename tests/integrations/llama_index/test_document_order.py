"""What LlamaIndex's own splitter says of its nodes puts chunks behind those before them."""

from __future__ import annotations

import chromadb
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.integrations.llama_index import ProphetKVChromaVectorStore
from tests.integrations.rag import HashingEmbedding, chunk_key
from tests.tiny import text_of, tiny_llama, tiny_tokenizer


def engine_of(encoding: str) -> ProphetKVEngine:
    return ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(encoding=encoding))


def test_nodes_stand_behind_those_of_their_document_and_an_update_follows() -> None:
    engine = engine_of("previous:2")
    store = ProphetKVChromaVectorStore.from_client(chromadb.EphemeralClient(), "nodes-in-order", engine)
    splitter = SentenceSplitter(chunk_size=40, chunk_overlap=0)
    documents = [Document(text=text_of(120, seed=seed), id_=str(seed)) for seed in (1, 2)]
    index = VectorStoreIndex.from_documents(
        documents,
        transformations=[splitter],
        embed_model=HashingEmbedding(),
        storage_context=StorageContext.from_defaults(vector_store=store),
    )

    def check(document: Document) -> None:
        keys = [chunk_key(engine, node.text) for node in splitter.get_nodes_from_documents([document])]
        assert len(keys) >= 3
        for number, key in enumerate(keys):
            assert engine.store.behind(key).keys == tuple(keys[max(0, number - 2) : number])

    for document in documents:
        check(document)
    changed = Document(text="It begins otherwise. " + text_of(100, seed=3), id_="1")
    index.update_ref_doc(changed)
    check(changed)
    check(documents[1])
    store.clear()


def test_nodes_stand_behind_their_neighbours_when_the_thread_is_through() -> None:
    engine = engine_of("neighbours:2")
    store = ProphetKVChromaVectorStore.from_client(chromadb.EphemeralClient(), "nodes-and-neighbours", engine)
    documents = [Document(text=text_of(20, seed=seed), id_=str(seed)) for seed in range(4)]
    VectorStoreIndex.from_documents(
        documents, embed_model=HashingEmbedding(), storage_context=StorageContext.from_defaults(vector_store=store)
    )
    store.client.encode_behind_neighbours()
    assert [len(engine.store.behind(chunk_key(engine, one.text)).keys) for one in documents] == [2] * 4
    store.clear()
