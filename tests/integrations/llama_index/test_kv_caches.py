"""The table in docs/vector_stores.md says of LlamaIndex's vector stores what keeps caches in step; rows are run here.

What a vector store holds is asked from the plain one, by a query that finds everything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.llama_index import ProphetKVLLM, with_kv_caches
from tests.integrations.llama_index.stores import KINDS, StoreKind
from tests.integrations.rag import QUESTION, TEXTS, HashingEmbedding, build_index, chunk_key
from tests.integrations.vector_store_table import PAGE, rows_of

NEW = "A wholly new text about the harbour and the boats of the town."


def node(number: int, text: str, name: str = "") -> TextNode:
    name = name or f"{number}0000000-0000-4000-8000-000000000000"
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"doc-{number}")}
    embedding = HashingEmbedding()._get_text_embedding(text)
    return TextNode(id_=name, text=text, metadata={"n": number}, embedding=embedding, relationships=source)


def nodes_of(*texts: str) -> list[TextNode]:
    return [node(number, text) for number, text in enumerate(texts, 1)]


EVERYTHING = VectorStoreQuery(query_embedding=HashingEmbedding()._get_text_embedding("the"), similarity_top_k=20)


class Case:
    """One kind of vector store, empty: plain, and wrapped."""

    def __init__(self, kind: StoreKind, engine: ProphetKVEngine, directory: Path) -> None:
        self.kind, self.engine = kind, engine
        self.plain = kind.make(directory)
        self.docstore: dict[str, TextNode] = {}
        read = None if kind.keeps_texts else lambda: list(self.docstore.values())
        self.store = with_kv_caches(self.plain, engine, read=read)

    def held(self) -> int:
        """How many records the vector store has."""
        try:
            return self.count(self.plain.query(EVERYTHING))
        except Exception as error:
            if any(reason in str(error) for reason in ("empty", "not found", "does not exist")):
                return 0
            raise

    def count(self, found: VectorStoreQueryResult) -> int:
        return len([one for one in found.ids or () if one not in (None, "-1", "")])

    def check(self, *texts: str) -> None:
        """The vector store holds these texts, and the engine's store their caches and no others."""
        assert self.held() == len(texts)
        self.check_caches(*texts)

    def check_caches(self, *texts: str) -> None:
        keys = {chunk_key(self.engine, text) for text in texts}
        [owner] = {owner for owners in self.engine.store._owners.values() for owner in owners} or {""}
        assert set(self.engine.store.references(owner)) == keys
        assert self.engine.store.stats().chunks == len(keys)
        assert all(key in self.engine.store for key in keys)

    def check_hits(self, index: VectorStoreIndex, count: int, **settings: Any) -> None:
        llm = ProphetKVLLM(engine=self.engine, max_new_tokens=2)
        index.as_query_engine(llm=llm, similarity_top_k=count, **settings).query(QUESTION)
        assert llm.last_report is not None
        assert [chunk.status for chunk in llm.last_report.chunks] == ["hit"] * count


def add(case: Case) -> None:
    case.store.add(nodes_of(*TEXTS))
    case.check(*TEXTS)


def delete(case: Case) -> str | None:
    index = build_index(case.store)
    case.check(*TEXTS)
    index.delete_ref_doc("doc-1")
    if case.held() == len(TEXTS):  # FAISS's with a map deletes no documents
        case.check_caches(*TEXTS)
        return "-"
    return case.check(TEXTS[0], *TEXTS[2:])


def delete_nodes(case: Case) -> None:
    written = nodes_of(*TEXTS)
    case.store.add(written)
    case.store.delete_nodes([written[0].node_id])
    case.check(*TEXTS[1:])


def clear(case: Case) -> None:
    case.store.add(nodes_of(*TEXTS))
    case.store.clear()
    case.check()


def update(case: Case) -> str | None:
    index = build_index(case.store)
    index.update_ref_doc(Document(text=NEW, id_="doc-1"))
    if case.held() > len(TEXTS):
        case.check_caches(*TEXTS, NEW)
        return "-"
    case.check(TEXTS[0], NEW, *TEXTS[2:])
    return case.check_hits(index, 3)


async def in_async(case: Case) -> None:
    await case.store.async_add(nodes_of(*TEXTS))
    assert case.count(await case.plain.aquery(EVERYTHING)) == len(TEXTS)
    case.check_caches(*TEXTS)
    await case.store.adelete_nodes([nodes_of(*TEXTS)[0].node_id])
    assert case.count(await case.store.aquery(EVERYTHING)) == len(TEXTS) - 1
    case.check_caches(*TEXTS[1:])


def mmr(case: Case) -> None:
    if not case.kind.has_modes:
        raise NotImplementedError
    case.check_hits(build_index(case.store), 2, vector_store_query_mode=VectorStoreQueryMode.MMR)


def filters(case: Case) -> None:
    nodes = nodes_of(*TEXTS)
    for one in nodes:
        one.embedding = None
    index = VectorStoreIndex.from_documents([], storage_context=storage(case.store), embed_model=HashingEmbedding())
    index.insert_nodes(nodes)
    only = MetadataFilters(filters=[MetadataFilter(key="n", value=2)])
    case.check_hits(index, 1, filters=only)
    found = index.as_retriever(similarity_top_k=4, filters=only).retrieve(QUESTION)
    assert [one.text for one in found] == [TEXTS[1]]


def storage(store: Any) -> Any:
    from llama_index.core import StorageContext

    return StorageContext.from_defaults(vector_store=store)


def cache_existing(case: Case) -> str | None:
    """Written, and deleted, by the plain vector store."""
    written = nodes_of(*TEXTS)
    case.plain.add(written)
    case.check_caches()
    case.docstore = {one.node_id: one for one in written}
    case.store.cache_existing()
    case.check(*TEXTS)
    try:
        case.plain.delete_nodes([written[0].node_id])
    except Exception:  # it deletes nothing
        if case.kind.keeps_texts:
            return None
        case.docstore.pop(written[0].node_id)
    case.store.cache_existing()
    case.check_caches(*TEXTS[1:])
    return None if case.kind.keeps_texts else "`read=`"


COLUMNS: dict[str, Callable[[Case], Any]] = {
    "add": add,
    "delete": delete,
    "delete_nodes": delete_nodes,
    "clear": clear,
    "update": update,
    "async": in_async,
    "MMR": mmr,
    "filters": filters,
    "cache_existing": cache_existing,
}
REFUSALS = ("not implemented", "not yet implemented", "not supported", "No field named")
"""What vector stores say of what they do not have."""


async def outcome(case: Case, run: Callable[[Case], Any]) -> str:
    """Whether caches keep step: "yes" (or what is said instead), or "-" where the vector store has no such thing."""
    try:
        result = run(case)
        if isinstance(result, str):
            return result
        if result is not None:
            await result
    except NotImplementedError:
        return "-"
    except Exception as error:
        if any(reason in str(error) for reason in REFUSALS):
            return "-"
        raise
    return "yes"


def test_the_table_has_these_rows() -> None:
    table = rows_of(PAGE, "llama_index")
    assert list(table) == [kind.name for kind in KINDS]
    assert all(len(cells) == len(COLUMNS) for cells in table.values())


@pytest.mark.parametrize("number", range(len(COLUMNS)), ids=lambda number: list(COLUMNS)[number])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.replace("`", ""))
async def test_the_row_is_what_is_measured(
    kind: StoreKind, number: int, fresh_engine: ProphetKVEngine, tmp_path: Path
) -> None:
    measured = await outcome(Case(kind, fresh_engine, tmp_path), list(COLUMNS.values())[number])
    assert rows_of(PAGE, "llama_index")[kind.name][number] == measured
