"""How a chunk's text is recognised in a prompt, without keeping the text; one entry, or many as columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class TextEntry:
    """How a chunk's text is recognised in a prompt, without keeping the text (see `prompt.chunk_index`).

    Attributes:
        anchor: 64-bit hash of the first characters, as a signed integer (SQLite's range).
        length: Length of the stripped text in characters.
        digest: sha256 of the stripped text in UTF-8, hex.
    """

    anchor: int
    length: int
    digest: str


class EntryColumns(NamedTuple):
    """Many chunks' keys and text entries, as columns: 100,000 objects less to make and to collect."""

    keys: Sequence[str]
    anchors: Sequence[int]
    lengths: Sequence[int]
    digests: Sequence[str]

    @classmethod
    def of(cls, entries: Iterable[tuple[str, TextEntry]]) -> EntryColumns:
        """Turn (key, entry) pairs into columns."""
        pairs = list(entries)
        return cls(
            [key for key, _ in pairs],
            [entry.anchor for _, entry in pairs],
            [entry.length for _, entry in pairs],
            [entry.digest for _, entry in pairs],
        )

    def pairs(self) -> Iterator[tuple[str, TextEntry]]:
        """Return (key, entry) pairs."""
        return zip(self.keys, map(TextEntry, self.anchors, self.lengths, self.digests), strict=True)
