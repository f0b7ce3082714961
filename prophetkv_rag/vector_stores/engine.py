"""What a collection's caches need of whoever encodes them: our engine on transformers, or vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prophetkv_rag.chunks import AddsChunks
    from prophetkv_rag.store import CacheIdentity, ChunkStore


class CachingEngine(Protocol):
    """See `ProphetKVEngine`, whose contract these methods have."""

    identity: CacheIdentity

    @property
    def store(self) -> ChunkStore:
        """Keeps the caches."""

    @property
    def library(self) -> AddsChunks:
        """The chunks that it knows."""

    def key_of(self, text: str) -> str:
        """Return the key of the chunk with this text, whether or not it is known."""

    def add_chunks(
        self,
        texts: Sequence[str],
        *,
        owner: str,
        behind: Sequence[Sequence[str]] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Compute and store the caches of chunks, as far as they are missing."""

    def remove_chunks(self, keys: Iterable[str], *, owner: str) -> list[str]:
        """Drop references."""
