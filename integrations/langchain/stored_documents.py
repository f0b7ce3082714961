"""What LangChain's vector stores hold: by id, as far as they tell, and all of it where we know how to ask."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain.near import NearDocuments
from prophetkv_rag.vector_stores import QUERY_SIZE, Record, UnreadableError, batches

Read = Callable[[], Iterable[Document]]
"""Returns every document of a vector store, with its id."""


class StoredDocuments:
    """The documents of one vector store, as records.

    Args:
        store: The vector store.
        given: The caller's way to read all of it; `None` for ours.
    """

    def __init__(self, store: VectorStore, given: Read | None) -> None:
        self.store = store
        self.given = given
        kinds = [kind.__name__ for kind in type(store).__mro__]
        self.reader = next((_READERS[kind] for kind in kinds if kind in _READERS), None)
        self._is_qdrant = "QdrantVectorStore" in kinds

    def name(self, given: Any) -> str:
        """Return an id as the vector store gives it back; "" for none."""
        if given is None:
            return ""
        if self._is_qdrant:  # takes UUIDs in any spelling
            with suppress(ValueError):
                return str(uuid.UUID(str(given)))
        return str(given)

    @property
    def is_of_one_thread(self) -> bool:
        """See `Records.is_of_one_thread`: whether it is one connection to a database."""
        return any(kind.__name__ in ("DuckDB", "SQLiteVec", "SQLiteVSS") for kind in type(self.store).__mro__)

    @property
    def is_overwritten(self) -> bool:
        """Whether a write takes the place of everything that was written before (`LanceDB(mode="overwrite")`)."""
        return self.reader is _lancedb and getattr(self.store, "mode", "") == "overwrite"

    def read(self, names: Sequence[str]) -> list[Record]:
        """Return the documents with these ids."""
        try:
            if self._is_qdrant:  # whose `get_by_ids` leaves ids out
                return _points(self.store, _qdrant_points(self.store, names))
            return [as_record(document) for document in self.store.get_by_ids(list(names))]
        except Exception as error:
            msg = f"{type(self.store).__name__}.get_by_ids: {str(error) or type(error).__name__}"
            raise UnreadableError(msg) from error

    def neighbourhood(self, written: Sequence[Record]) -> NearDocuments:
        """See `Records.neighbourhood`."""
        return NearDocuments(self, self.store, written)

    def read_all(self) -> Iterator[Record]:
        """Return every document."""
        if self.given is not None:
            return (as_record(document) for document in self.given())
        if self.reader is not None:
            return self.reader(self.store)
        msg = (
            f"it is not known how to read all of a {type(self.store).__name__}; give with_kv_caches(..., read=...) a "
            "function that returns its documents, each with its id"
        )
        raise UnreadableError(msg)


def as_record(document: Document) -> Record:
    """Return a document as a record.

    Raises:
        InputError: If it has no id.
    """
    if document.id is None:
        msg = f"a stored document has no id, so its cache cannot be told from others: {document.page_content[:40]!r}"
        raise InputError(msg)
    return Record(str(document.id), document.page_content, document.metadata)


def _in_memory(store: Any) -> Iterator[Record]:
    for name, held in list(store.store.items()):
        yield Record(str(name), held["text"], held["metadata"])


def _chroma(store: Any) -> Iterator[Record]:
    for part in batches(store.get(include=[])["ids"], QUERY_SIZE):
        found = store.get(ids=part, include=["documents", "metadatas"])
        yield from map(Record, found["ids"], found["documents"], found["metadatas"])


def _faiss(store: Any) -> Iterator[Record]:
    for name in list(store.index_to_docstore_id.values()):
        found = store.docstore.search(name)
        if isinstance(found, Document):
            yield Record(str(name), found.page_content, found.metadata)


def _qdrant(store: Any) -> Iterator[Record]:
    offset = None
    while True:
        points, offset = store.client.scroll(store.collection_name, limit=QUERY_SIZE, offset=offset)
        yield from _points(store, points)
        if offset is None:
            return


def _qdrant_points(store: Any, names: Sequence[str]) -> Any:
    return store.client.retrieve(store.collection_name, [int(name) if name.isdecimal() else name for name in names])


def _points(store: Any, points: Any) -> list[Record]:
    return [
        Record(str(one.id), one.payload.get(store.content_payload_key), one.payload.get(store.metadata_payload_key))
        for one in points
    ]


def _lancedb(store: Any) -> Iterator[Record]:
    table = store.get_table() if hasattr(store, "get_table") else store._get_or_create_table()[0]
    if table is None:  # made by the first write
        return
    name, text = getattr(store, "_id_key", "id"), getattr(store, "_text_key", "text")
    for held in table.search().select([name, text, "metadata"]).limit(table.count_rows()).to_list():
        metadata = held["metadata"]
        yield Record(held[name], held[text], json.loads(metadata) if isinstance(metadata, str) else metadata)


def _milvus(store: Any) -> Iterator[Record]:
    if not store.client.has_collection(store.collection_name):  # made by the first write
        return
    fields = [field for field in store.fields if field not in store._as_list(store._vector_field)]
    found = store.client.query_iterator(store.collection_name, batch_size=QUERY_SIZE, output_fields=fields)
    while part := found.next():
        for held in part:
            yield Record(str(held.pop(store._primary_field)), held.pop(store._text_field), held)


def _duckdb(store: Any) -> Iterator[Record]:
    columns = f"{store._id_key}, {store._text_key}, metadata"
    for held in store._connection.execute(f"SELECT {columns} FROM {store._table_name}").fetchall():
        yield Record(str(held[0]), held[1], json.loads(held[2] or "{}"))


_READERS: dict[str, Callable[[Any], Iterator[Record]]] = {
    "InMemoryVectorStore": _in_memory,
    "Chroma": _chroma,
    "FAISS": _faiss,
    "QdrantVectorStore": _qdrant,
    "LanceDB": _lancedb,
    "Milvus": _milvus,
    "DuckDB": _duckdb,
}
"""By the class's name: importing the class would need its package."""
