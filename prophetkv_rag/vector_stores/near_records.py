"""Which records of any vector store are near a record: what its framework's own search finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from prophetkv_rag.vector_stores.document_order import Record
from prophetkv_rag.vector_stores.neighbours import Placed
from prophetkv_rag.vector_stores.records import Records, read_somehow


class NearRecords(ABC):
    """See `Neighbourhood`.

    Args:
        records: Reads the vector store.
        store: The vector store.
        written: What was just written to it: need not be read back, and has embeddings where its framework has.
    """

    def __init__(self, records: Records, store: Any, written: Sequence[Record]) -> None:
        self.records = records
        self.store = store
        self.written: Mapping[str, Record] = {record.name: record for record in written}

    def place(self, names: Sequence[str]) -> tuple[list[Placed], int]:
        """See `Neighbourhood.place`; raises `UnreadableError`."""
        found = [self.written[name] for name in names if name in self.written]
        rest = [name for name in names if name not in self.written]
        found += read_somehow(self.records, rest) if rest else ()
        with_text = [record._replace(text=record.text or self.kept_text(record.name)) for record in found]
        placed = self.with_embeddings([record for record in with_text if record.text and record.text.strip()])
        return placed, len(found) - len(placed)

    def kept_text(self, name: str) -> str | None:
        """Return the text of a record that the vector store has without it; `None` where that is not known."""
        return None

    @abstractmethod
    def with_embeddings(self, records: Sequence[Record]) -> list[Placed]:
        """Return those of these records, all of which have a text, that a search can begin from."""

    @abstractmethod
    def nearest(self, placed: Sequence[Placed], count: int) -> Sequence[Sequence[str | None]]:
        """See `Neighbourhood.nearest`; raises `UnreadableError`."""
