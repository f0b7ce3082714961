"""Ingestion pipelines and a Chroma server: what is cached follows the documents, and nothing is computed twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore import SimpleDocumentStore

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.llama_index import ProphetKVChromaVectorStore, ProphetKVLLM
from prophetkv_rag.store.disk.store import DiskStore
from tests.chroma.clients import chroma_server
from tests.integrations.conftest import MODEL
from tests.integrations.rag import QUESTION, TEXTS, CallLog, HashingEmbedding, build_index
from tests.tiny import tiny_tokenizer


class Encoded:
    """Counts the chunks that are encoded."""

    def __init__(self, engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = engine.library._writer.put

        def put(*args: Any) -> bool:
            self.count += 1
            return real(*args)

        monkeypatch.setattr(engine.library._writer, "put", put)

    def since(self) -> int:
        count, self.count = self.count, 0
        return count


def documents(**changed: str) -> list[Document]:
    return [Document(text=changed.get(f"d{i}", text), id_=f"d{i}") for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("style", ["sync", "async"])
@pytest.mark.parametrize("strategy", list(DocstoreStrategy))
async def test_docstore_strategies_keep_caches_in_step(
    strategy: DocstoreStrategy,
    style: str,
    fresh_engine: ProphetKVEngine,
    new_vector_store: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = Encoded(fresh_engine, monkeypatch)
    store = new_vector_store(fresh_engine)
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(), HashingEmbedding()],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=strategy,
    )

    async def run(found: list[Document]) -> None:
        if style == "sync":
            pipeline.run(documents=found)
        else:
            await pipeline.arun(documents=found)

    await run(documents())
    assert encoded.since() == 4
    await run(documents())
    assert encoded.since() == 0, "unchanged documents cost nothing"

    changed = documents(d1="The museum opens at eleven since the first of May, says the new sign.")[:3]
    await run(changed)
    assert encoded.since() == 1
    kept = {text for text in TEXTS if fresh_engine.chunk_index.find(text)}
    gone = {
        DocstoreStrategy.UPSERTS: {TEXTS[1]},
        DocstoreStrategy.UPSERTS_AND_DELETE: {TEXTS[1], TEXTS[3]},
        DocstoreStrategy.DUPLICATES_ONLY: set[str](),
    }[strategy]
    assert kept == set(TEXTS) - gone
    assert fresh_engine.store.stats().chunks == len(store.get_nodes()) == 5 - len(gone)


def test_an_ingestion_cache_serves_nodes_and_caches_alike(
    fresh_engine: ProphetKVEngine, new_vector_store: Any, monkeypatch: pytest.MonkeyPatch, call_log: CallLog
) -> None:
    """A second collection filled from the pipeline's cache: nothing is split, embedded or encoded again."""
    encoded = Encoded(fresh_engine, monkeypatch)
    embedded = []
    real = HashingEmbedding._get_text_embedding
    monkeypatch.setattr(
        HashingEmbedding, "_get_text_embedding", lambda self, text: embedded.append(text) or real(self, text)
    )
    cache = IngestionCache()
    for expected in (4, 0):
        store = new_vector_store(fresh_engine)
        steps = [SentenceSplitter(), HashingEmbedding()]
        IngestionPipeline(transformations=steps, vector_store=store, cache=cache).run(documents=documents())
        assert (encoded.since(), len(embedded)) == (expected, expected)
        embedded.clear()
    index = VectorStoreIndex.from_vector_store(store, embed_model=HashingEmbedding())
    index.as_query_engine(llm=ProphetKVLLM(engine=fresh_engine, max_new_tokens=2), similarity_top_k=4).query(QUESTION)
    assert [chunk["status"] for chunk in call_log.chunks] == ["hit"] * 4


def test_a_chroma_server(tmp_path: Path, call_log: CallLog) -> None:
    """Records on a real server, caches here: written, found after a restart of this side, deleted."""

    def start() -> ProphetKVEngine:
        return ProphetKVEngine(MODEL, tiny_tokenizer(), store=DiskStore(tmp_path / "kv"))

    (tmp_path / "server").mkdir()
    with chroma_server(tmp_path / "server") as new_client:
        engine = start()
        build_index(ProphetKVChromaVectorStore.from_client(new_client(), "docs", engine), file_name="town.md")
        assert engine.store.stats().chunks == 4
        engine.store.close()

        engine = start()
        store = ProphetKVChromaVectorStore.from_client(new_client(), "docs", engine)
        index = VectorStoreIndex.from_vector_store(store, embed_model=HashingEmbedding())
        llm = ProphetKVLLM(engine=engine, max_new_tokens=4)
        stream = index.as_query_engine(llm=llm, similarity_top_k=4, streaming=True).query(QUESTION)
        answer = "".join(stream.response_gen)
        assert answer == call_log.calls[0].response.message.content != ""
        assert [chunk["status"] for chunk in call_log.chunks] == ["hit"] * 4

        index.update_ref_doc(Document(text="The old harbour is closed since Monday.", id_="doc-0"))
        index.delete_ref_doc("doc-1")
        assert engine.store.stats().chunks == 3
        store.clear()
        assert engine.store.stats().chunks == 0
        engine.store.close()
