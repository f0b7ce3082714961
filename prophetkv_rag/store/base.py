"""The contract between the engine and whatever keeps chunk caches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, NamedTuple

from prophetkv_rag.errors import StoreError
from prophetkv_rag.once import once
from prophetkv_rag.store.failures import Failures
from prophetkv_rag.store.reports import StoreStats, VerifyReport
from prophetkv_rag.store.text_entry import EntryColumns, TextEntry

if TYPE_CHECKING:
    from prophetkv_rag.store.chunk_cache import Behind, ChunkCache

Policy = Literal["eager", "on_first_use", "read_only"]
"""When caches are computed and stored: as soon as a chunk is added, when a prompt first has it, or never."""
Tier = Literal["ram", "disk", "remote"]
"""Where a cache was when a prompt asked for it."""


class Lookup(NamedTuple):
    """What a look-up came to: the verified cache or `None`, whether a bad blob was there, and where the cache was."""

    cache: ChunkCache | None = None
    was_corrupt: bool = False
    tier: Tier | None = None


class ChunkStore(ABC):
    """Keeps chunk caches by key, and who refers to them. Every method is safe to call from several threads.

    A key belongs to one identity (`CacheIdentity.fingerprint`); one store may hold caches of several models. What is
    not abstract has a default that fits a store without limits, in RAM.
    """

    policy: Policy = "eager"

    @once
    def failures(self) -> Failures:
        """What could not be written since the store was opened; the engine notes here what it had to do without."""
        return Failures()

    def get(self, key: str, *, fingerprint: str, input_ids: Sequence[int]) -> tuple[ChunkCache | None, bool]:
        """As `find`, without saying where the cache was."""
        return self.find(key, fingerprint=fingerprint, input_ids=input_ids)[:2]

    @abstractmethod
    def find(self, key: str, *, fingerprint: str, input_ids: Sequence[int] | None) -> Lookup:
        """Look a cache up; what is found is verified, and is of exactly these tokens and this fingerprint.

        Without `input_ids` it may be of any tokens: of those that the key was made of, as far as the blob says.

        Never raises for a bad blob: it is logged once, counted and dropped, so that the caller computes it again.
        """

    @abstractmethod
    def put(
        self,
        key: str,
        cache: ChunkCache,
        *,
        fingerprint: str,
        entry: TextEntry | None = None,
        if_referenced: bool = False,
    ) -> None:
        """Store a cache (idempotent). After it returns the cache survives a crash, where the store is persistent.

        A cache that is there already stays, unless it was encoded behind other chunks: then the new one takes its
        place, in one step. A cache that bears the trace of a chunk that the store does not know (any more) is not
        stored.

        With `if_referenced` nothing happens unless somebody refers to the key: a query that computes a lost cache
        again must not bring back one that was deleted meanwhile.
        """

    @abstractmethod
    def __contains__(self, key: str) -> bool:
        """Whether a cache is stored under `key` (its content is checked by `get`, not here)."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Drop caches, their catalog rows and their references, and all caches that bear their trace."""

    @abstractmethod
    def behind(self, key: str) -> Behind:
        """What a chunk's cache is encoded behind, or was, if it is gone since; of the plain ones and unknown: none."""

    @abstractmethod
    def followed(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that other chunks are chained behind: that come before those in their document."""

    @abstractmethod
    def known(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that are chunks of this store, with or without a cache."""

    @abstractmethod
    def drop_caches(self, keys: Iterable[str]) -> None:
        """Drop caches that bear the trace of a deleted chunk; their chunks stay known. Never waits, never raises."""

    @abstractmethod
    def add_references(self, owner: str, keys: Iterable[str]) -> None:
        """Note that `owner` (a collection's id, or `"engine"`) refers to these keys."""

    @abstractmethod
    def drop_references(self, owner: str, keys: Iterable[str]) -> list[str]:
        """Drop `owner`'s references and delete the caches that no owner refers to any more; returns those keys."""

    def keep_with(self, key: str, chunk: str) -> None:
        """Keep what `put_soon` stores next under `key` for as long as a chunk is known: another cache of its text.

        A chunk that is deleted takes it along, in the same step, unless somebody else refers to it. With a chunk that
        the store does not know nothing is kept. Never waits, never raises.
        """
        return None

    @abstractmethod
    def references(self, owner: str) -> list[str]:
        """Return the keys that `owner` refers to."""

    @abstractmethod
    def entries(self, fingerprint: str) -> Iterator[tuple[str, TextEntry]]:
        """All (key, entry) of one identity that were stored with a text entry."""

    def entry_columns(self, fingerprint: str) -> EntryColumns:
        """As `entries`, for whoever wants all of them at once."""
        return EntryColumns.of(self.entries(fingerprint))

    def new_entries(self, fingerprint: str) -> Iterator[tuple[str, TextEntry]]:
        """Entries that another process may have added since the last call; empty for stores of one process."""
        return iter(())

    def new_chunks(self, fingerprint: str) -> Iterator[tuple[str, list[int]]]:
        """(Key, token ids) of one identity's chunks that were stored since the last call, by whatever process.

        For whoever finds chunks by their tokens; empty for stores that are of one process alone.
        """
        return iter(())

    @abstractmethod
    def stats(self) -> StoreStats:
        """What is stored and how it was used."""

    @abstractmethod
    def verify(self, *, repair: bool = False) -> VerifyReport:
        """Check every stored cache; with `repair` drop what is bad, missing or orphaned."""

    def reject(self, key: str, *, fingerprint: str, input_ids: Sequence[int], dtype: str) -> None:
        """Drop a cache that `find` gave and that is not of this dtype; its references stay. Never waits, never raises.

        Logged once and counted, as what `find` finds bad itself. Without it such a cache is computed again each time.
        """
        return None

    def knows(self, key: str) -> bool:
        """Whether the chunk is one of this store's, also while it has no cache (evicted, not computed yet)."""
        return key in self

    def note(self, key: str, *, fingerprint: str, num_tokens: int, entry: TextEntry | None) -> None:
        """Know a chunk without a cache: its text is found in prompts, and its cache is stored when it is computed."""
        return None

    def accepts_new(self, waiting: int = 0, *, fingerprint: str | None = None) -> bool:
        """Whether a chunk that nobody has asked for yet would be kept, after `waiting` others of its fingerprint."""
        return self.policy == "eager"

    def forget_deleted(self) -> None:
        """Let go, soon, of what this process holds in RAM and another one has deleted; never waits, never raises."""
        return None

    def read_ahead(self, keys: Iterable[str], *, fingerprint: str) -> Future[None] | None:
        """Begin to load caches that a prompt is about to need, without making the caller wait; never raises.

        Returns:
            What is done when those on disk that can be read, and fit, are in RAM; `None` where nothing is read.
        """
        return None

    def expect(self, keys: Iterable[str], *, fingerprint: str) -> None:
        """These are about to be loaded: begin to bring them from a slower tier; never waits, never raises."""
        return None

    def bring(self, chunks: Mapping[str, tuple[Sequence[int], TextEntry | None]], *, fingerprint: str) -> set[str]:
        """Bring caches (key -> token ids and text entry) from a slower tier while indexing, where it has them.

        Returns:
            Keys that need not be computed: the store knows them now. Never raises.
        """
        return set()

    def pin_memory(self) -> None:
        """Hold caches in RAM where a GPU copies them from directly, packed ones packed; for models that are on one."""
        return None

    def put_soon(self, key: str, cache: ChunkCache, *, fingerprint: str) -> None:
        """Store the cache of a chunk that somebody refers to, without making the caller wait; never raises."""
        try:
            self.put(key, cache, fingerprint=fingerprint, if_referenced=True)
        except (StoreError, OSError) as error:
            self.failures.note(error, caches=1)

    def flush(self) -> None:
        """Wait until everything that `put_soon` took is stored, or has failed."""
        return None

    def lease(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Keep these caches from being evicted or collected while the block runs."""
        return nullcontext()

    def describe(self, fingerprint: str, *, model: str, namespace: str, seconds_per_token: float | None) -> None:
        """Note what a fingerprint stands for and what its caches cost, for statistics and for eviction."""
        return None

    def seal(self, name: str, data: bytes) -> bytes:
        """Return what is written for a file beside the store: the data itself, or encrypted where blobs are.

        Raises:
            StoreError: If the store cannot be used with the key that it was given.
        """
        return data

    def unseal(self, name: str, data: bytes) -> bytes:
        """Return what `seal` was given under this name.

        Raises:
            BlobError: If it was changed, or is encrypted otherwise than blobs are.
        """
        return data

    def close(self) -> None:
        """Release files and connections; the store cannot be used afterwards."""
        return None
