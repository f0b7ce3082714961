"""What a framework's vector store tells of its records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from prophetkv_rag.vector_stores.document_order import Record

if TYPE_CHECKING:
    from prophetkv_rag.vector_stores.neighbours import Neighbourhood


class UnreadableError(Exception):
    """A vector store that does not say which records it has; the message says what to do."""


class Records(Protocol):
    """What a framework's vector store tells of its records. A text is `None` where it is kept somewhere else."""

    given: Any
    """The caller's own way to read all of them, if there is one."""

    @property
    def is_of_one_thread(self) -> bool:
        """Whether searches in a thread of ours could disturb those of the caller's."""

    def name(self, given: Any) -> str:
        """Return an id as the vector store gives it back; "" for none."""

    def read(self, names: Sequence[str]) -> Sequence[Record]:
        """Return the records with these ids; raises `UnreadableError` where that cannot be asked."""

    def read_all(self) -> Iterable[Record]:
        """Return every record; raises `UnreadableError` where that cannot be asked."""

    def neighbourhood(self, written: Sequence[Record]) -> Neighbourhood:
        """Return what finds neighbours; what was just written need not be read back."""


def read_somehow(records: Records, names: Sequence[str]) -> Sequence[Record]:
    """Return the records with these ids, if need be by reading all; raises `UnreadableError`."""
    try:
        return records.read(names)
    except UnreadableError:
        wanted = set(names)
        return [record for record in records.read_all() if record.name in wanted]
