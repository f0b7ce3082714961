"""What LangChain's own splitter writes into metadata puts chunks behind those before them."""

from __future__ import annotations

import chromadb
import pytest
from langchain_core.documents import Document
from langchain_text_splitters import RecursiveCharacterTextSplitter

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.integrations.langchain import ProphetKVChroma
from tests.integrations.langchain.rag import HashingEmbeddings
from tests.integrations.rag import chunk_key
from tests.tiny import text_of, tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_split_documents_stand_behind_their_own_chunks_only(is_shuffled: bool) -> None:
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(encoding="previous:2"))
    documents = [Document(text_of(60, seed=seed), metadata={"source": f"{seed}.txt"}) for seed in (1, 2)]
    splitter = RecursiveCharacterTextSplitter(chunk_size=120, chunk_overlap=0, add_start_index=True)
    chunks = splitter.split_documents(documents)
    by_source = [[one.page_content for one in chunks if one.metadata["source"] == f"{n}.txt"] for n in (1, 2)]
    assert min(map(len, by_source)) >= 3
    store = ProphetKVChroma(
        f"order-{is_shuffled}", HashingEmbeddings(), client=chromadb.EphemeralClient(), engine=engine
    )
    store.add_documents(chunks[::-1] if is_shuffled else chunks)
    for texts in by_source:
        keys = [chunk_key(engine, text) for text in texts]
        for number, key in enumerate(keys):
            assert engine.store.behind(key).keys == tuple(keys[max(0, number - 2) : number])
    store.delete_collection()
