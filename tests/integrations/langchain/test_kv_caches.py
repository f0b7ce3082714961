"""The table in docs/vector_stores.md says of LangChain's vector stores what keeps caches in step; each row is run here.

What a vector store holds is asked from the plain one, by a search that finds everything.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.vectorstores import VectorStore

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.langchain import with_kv_caches
from tests.integrations.langchain.rag import HashingEmbeddings
from tests.integrations.langchain.stores import KINDS, StoreKind
from tests.integrations.rag import TEXTS, chunk_key
from tests.integrations.vector_store_table import PAGE, rows_of

NEW = "A wholly new text about the harbour and the boats of the town."
IDS = [f"{number}0000000-0000-4000-8000-000000000000" for number in range(1, 5)]
"""UUIDs: Qdrant takes no other text."""


class Case:
    """One kind of vector store, empty: plain, and wrapped."""

    def __init__(self, kind: StoreKind, engine: ProphetKVEngine, directory: Path) -> None:
        self.kind, self.engine, self.directory = kind, engine, directory
        self.plain = kind.make(directory, HashingEmbeddings())
        self.store = with_kv_caches(self.plain, engine)

    def documents(self, *texts: str, ids: bool = True) -> list[Document]:
        return [
            Document(text, id=IDS[number] if ids else None, metadata={"n": number}) for number, text in enumerate(texts)
        ]

    def held(self) -> set[str]:
        return {document.page_content for document in self.plain.similarity_search("the", k=20)}

    def check(self, *texts: str) -> None:
        """The vector store holds these texts, and the engine's store their caches and no others."""
        assert self.held() == set(texts)
        self.check_caches(*texts)

    def check_caches(self, *texts: str) -> None:
        keys = {chunk_key(self.engine, text) for text in texts}
        [owner] = {owner for owners in self.engine.store._owners.values() for owner in owners} or {""}
        assert set(self.engine.store.references(owner)) == keys
        assert self.engine.store.stats().chunks == len(keys)
        assert all(key in self.engine.store for key in keys)

    def check_hits(self, found: list[Document]) -> None:
        prompt = "\n\n".join(document.page_content for document in found) + "\n\nWhen does the museum open?"
        assert [chunk.status for chunk in self.engine.prefill(prompt).report.chunks] == ["hit"] * len(found)


def add(case: Case) -> None:
    written = case.store.add_documents(case.documents(*TEXTS[:3]), ids=IDS[:3])
    assert len(written) == 3
    case.check(*TEXTS[:3])
    case.store.add_texts([NEW], metadatas=[{"n": 7}], ids=IDS[3:])
    case.check(*TEXTS[:3], NEW)


def delete(case: Case) -> None:
    ids = case.store.add_documents(case.documents(*TEXTS, ids=False))
    case.store.delete(ids[:2])
    case.check(*TEXTS[2:])
    case.store.delete(ids[2:])
    case.check()


def update(case: Case) -> str | None:
    """Whatever the vector store makes of an id that it has: a replacement, or a second record."""
    case.store.add_documents(case.documents(*TEXTS[:2]), ids=IDS[:2])
    case.store.add_documents(case.documents(NEW), ids=IDS[:1])
    held = case.held()
    assert {NEW, TEXTS[1]} <= held
    case.check(*held)
    return "adds" if TEXTS[0] in held else None


async def in_async(case: Case) -> None:
    ids = await case.store.aadd_documents(case.documents(*TEXTS, ids=False))
    case.check(*TEXTS)
    await case.store.aadd_texts([NEW], metadatas=[{"n": 7}])
    case.check(*TEXTS, NEW)
    if type(case.plain).delete is not VectorStore.delete:
        await case.store.adelete(ids[:2])
        case.check(*TEXTS[2:], NEW)


def mmr(case: Case) -> None:
    case.store.add_documents(case.documents(*TEXTS, ids=False))
    found = case.store.as_retriever(search_type="mmr", search_kwargs={"k": 2}).invoke("museum library")
    assert len(found) == 2
    case.check_hits(found)


def filters(case: Case) -> None:
    if case.kind.filter_for is None:
        raise NotImplementedError
    case.store.add_documents(case.documents(*TEXTS, ids=False))
    found = case.store.similarity_search("museum library", k=4, filter=case.kind.filter_for(1))
    assert [document.page_content for document in found] == [TEXTS[1]]
    case.check_hits(found)


async def record_manager(case: Case) -> None:
    """Two runs of `index`, then two of `aindex`; what has changed or gone is deleted."""
    records = InMemoryRecordManager("test")

    async def run(is_async: bool, *texts: str) -> Any:
        documents = [Document(text, metadata={"source": "a", "n": n}) for n, text in enumerate(texts)]
        settings = {"cleanup": "full", "source_id_key": "source", "key_encoder": uuid_of}
        if is_async:
            return await aindex(documents, records, case.store, **settings)
        return index(documents, records, case.store, **settings)

    assert (await run(False, *TEXTS[:3]))["num_added"] == 3
    assert (await run(False, *TEXTS[:3]))["num_skipped"] == 3
    await run(False, TEXTS[0], NEW)
    case.check(TEXTS[0], NEW)
    await run(True, TEXTS[0], TEXTS[3])
    case.check(TEXTS[0], TEXTS[3])


def uuid_of(document: Document) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, document.page_content))


def from_texts(case: Case) -> None:
    class_, arguments = case.kind.class_(case.directory)
    made = with_kv_caches(class_, case.engine).from_texts(
        list(TEXTS[:2]), HashingEmbeddings(), metadatas=[{"n": 0}, {"n": 1}], **arguments
    )
    assert isinstance(made, class_)
    case.plain = made
    case.check(*TEXTS[:2])


def cache_existing(case: Case) -> None:
    """Written, and deleted, by the plain vector store."""
    ids = case.plain.add_documents(case.documents(*TEXTS, ids=False))
    case.check_caches()
    case.store.cache_existing()
    case.check(*TEXTS)
    try:
        case.plain.delete([ids[0]])
    except NotImplementedError:
        return
    case.store.cache_existing()
    case.check(*TEXTS[1:])


COLUMNS: dict[str, Callable[[Case], Awaitable[None] | None]] = {
    "add": add,
    "delete": delete,
    "update": update,
    "async": in_async,
    "MMR": mmr,
    "filters": filters,
    "`index()`": record_manager,
    "`from_texts`": from_texts,
    "`cache_existing()`": cache_existing,
}


REFUSALS = ("already exist", "Duplicate key", "has not implemented the delete")
"""What vector stores and LangChain say where an id cannot be written twice, or nothing can be deleted."""


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
    table = rows_of(PAGE, "langchain")
    assert list(table) == [kind.name for kind in KINDS]
    assert all(len(cells) == len(COLUMNS) for cells in table.values())


@pytest.mark.parametrize("number", range(len(COLUMNS)), ids=lambda number: list(COLUMNS)[number].strip("`()"))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.replace("`", ""))
async def test_the_row_is_what_is_measured(
    kind: StoreKind, number: int, fresh_engine: ProphetKVEngine, tmp_path: Path
) -> None:
    measured = await outcome(Case(kind, fresh_engine, tmp_path), list(COLUMNS.values())[number])
    assert rows_of(PAGE, "langchain")[kind.name][number] == measured
