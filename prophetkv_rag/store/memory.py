"""Chunk caches in this process's RAM: for ephemeral collections, tests and trials."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prophetkv_rag.errors import InputError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.store.base import ChunkStore, Lookup
from prophetkv_rag.store.chunk_cache import ALONE, Behind, ChunkCache
from prophetkv_rag.store.keys import check_key, chunk_owner
from prophetkv_rag.store.reports import StoreStats, VerifyReport
from prophetkv_rag.store.text_entry import TextEntry

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Chunk:
    cache: ChunkCache | None
    fingerprint: str
    entry: TextEntry | None
    behind: Behind = ALONE


class MemoryStore(ChunkStore):
    """Nothing survives the process.

    Args:
        max_bytes: Most K/V bytes held; the least recently used caches go first, and their chunks stay known: they are
            found in prompts and computed again. `None` keeps every cache until it is deleted.

    Raises:
        InputError: If `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 0:
            msg = f"max_bytes is {max_bytes}; give 0 or more bytes, or None for no limit"
            raise InputError(msg)
        self.max_bytes = max_bytes
        self._lock = threading.RLock()
        around_fork(self, "_lock")
        self._chunks: dict[str, _Chunk] = {}
        self._owners: dict[str, set[str]] = {}
        self._recent: OrderedDict[str, int] = OrderedDict()  # keys of held caches and their bytes, the last used last
        self._nbytes = self._typical = 0
        self._hits = self._misses = self._corrupt = self._evictions = 0

    def find(self, key: str, *, fingerprint: str, input_ids: Sequence[int] | None) -> Lookup:
        """See `ChunkStore.find`."""
        check_key(key)
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is None or chunk.cache is None:
                self._misses += 1
                return Lookup()
            if chunk.fingerprint == fingerprint and chunk.cache.has_ids(input_ids):
                self._hits += 1
                self._recent.move_to_end(key)
                return Lookup(chunk.cache, tier="ram")
            logger.warning("dropped the chunk cache %s: it is another model's or another text's", key)
            self._drop(key)
            del self._chunks[key]
            self._corrupt += 1
            return Lookup(was_corrupt=True)

    def reject(self, key: str, *, fingerprint: str, input_ids: Sequence[int], dtype: str) -> None:
        """See `ChunkStore.reject`."""
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None and chunk.cache is not None and not chunk.cache.is_of(dtype):
                logger.warning("dropped the chunk cache %s: its numbers are not of %s", key, dtype)
                self._drop(key)
                self._corrupt += 1

    def put(
        self,
        key: str,
        cache: ChunkCache,
        *,
        fingerprint: str,
        entry: TextEntry | None = None,
        if_referenced: bool = False,
    ) -> None:
        """See `ChunkStore.put`."""
        check_key(key)
        with self._lock:
            if if_referenced and not self._owners.get(key):
                return
            if not self._chunks.keys() >= set(cache.behind.traces):
                return
            chunk = self._chunks.setdefault(key, _Chunk(None, fingerprint, entry))
            chunk.entry = entry or chunk.entry
            self._typical = cache.nbytes
            is_there = chunk.cache is not None and chunk.cache.behind == cache.behind
            if is_there or (self.max_bytes is not None and cache.nbytes > self.max_bytes):
                return
            self._drop(key)
            chunk.cache, chunk.fingerprint, chunk.behind = cache.owned(), fingerprint, cache.behind
            self._recent[key] = cache.nbytes
            self._nbytes += cache.nbytes
            while self.max_bytes is not None and self._nbytes > self.max_bytes:
                self._drop(next(iter(self._recent)))
                self._evictions += 1

    def __contains__(self, key: str) -> bool:
        chunk = self._chunks.get(key)
        return chunk is not None and chunk.cache is not None

    def knows(self, key: str) -> bool:
        """See `ChunkStore.knows`."""
        return key in self._chunks

    def known(self, keys: Iterable[str]) -> set[str]:
        """See `ChunkStore.known`."""
        with self._lock:
            return {key for key in keys if key in self._chunks}

    def behind(self, key: str) -> Behind:
        """See `ChunkStore.behind`."""
        with self._lock:
            chunk = self._chunks.get(key)
            return ALONE if chunk is None else chunk.behind

    def followed(self, keys: Iterable[str]) -> set[str]:
        """See `ChunkStore.followed`."""
        with self._lock:
            there = {key for chunk in self._chunks.values() if chunk.behind.is_chained for key in chunk.behind.keys}
        return there.intersection(keys)

    def drop_caches(self, keys: Iterable[str]) -> None:
        """See `ChunkStore.drop_caches`."""
        with self._lock:
            for key in keys:
                if key in self._chunks:
                    self._drop(key)
                    self._chunks[key].behind = ALONE

    def note(self, key: str, *, fingerprint: str, num_tokens: int, entry: TextEntry | None) -> None:
        """See `ChunkStore.note`."""
        with self._lock:
            chunk = self._chunks.setdefault(check_key(key), _Chunk(None, fingerprint, entry))
            chunk.entry = entry or chunk.entry

    def accepts_new(self, waiting: int = 0, *, fingerprint: str | None = None) -> bool:
        """See `ChunkStore.accepts_new`."""
        return self.max_bytes is None or self._nbytes + self._typical * (1 + waiting) <= self.max_bytes

    def _drop(self, key: str) -> None:
        self._nbytes -= self._recent.pop(key, 0)
        self._chunks[key].cache = None

    def keep_with(self, key: str, chunk: str) -> None:
        """See `ChunkStore.keep_with`."""
        with self._lock:
            if chunk in self._chunks:
                self.add_references(chunk_owner(chunk), [key])

    def delete(self, keys: Iterable[str]) -> None:
        """See `ChunkStore.delete`."""
        keys = list(keys)
        with self._lock:
            owners = {chunk_owner(key) for key in keys}
            for key, referring in self._owners.items():
                if not owners.isdisjoint(referring):
                    referring -= owners
                    if not referring and key not in keys:
                        keys.append(key)
            for key in keys:
                if key in self._chunks:
                    self._drop(key)
                    del self._chunks[key]
                self._owners.pop(key, None)
            gone = set(keys)
            self.drop_caches([key for key, chunk in self._chunks.items() if not gone.isdisjoint(chunk.behind.traces)])

    def add_references(self, owner: str, keys: Iterable[str]) -> None:
        """See `ChunkStore.add_references`."""
        with self._lock:
            for key in keys:
                self._owners.setdefault(check_key(key), set()).add(owner)

    def drop_references(self, owner: str, keys: Iterable[str]) -> list[str]:
        """See `ChunkStore.drop_references`."""
        unreferenced = []
        with self._lock:
            for key in keys:
                owners = self._owners.get(key, set())
                if owner in owners:
                    owners.discard(owner)
                    if not owners:
                        unreferenced.append(key)
            self.delete(unreferenced)
        return unreferenced

    def references(self, owner: str) -> list[str]:
        """Keys that `owner` refers to."""
        with self._lock:
            return [key for key, owners in self._owners.items() if owner in owners]

    def entries(self, fingerprint: str) -> Iterator[tuple[str, TextEntry]]:
        """See `ChunkStore.entries`."""
        with self._lock:
            chunks = list(self._chunks.items())
        return iter(
            [
                (key, chunk.entry)
                for key, chunk in chunks
                if chunk.entry is not None and chunk.fingerprint == fingerprint
            ]
        )

    def stats(self) -> StoreStats:
        """See `ChunkStore.stats`."""
        with self._lock:
            caches = [chunk.cache for chunk in self._chunks.values() if chunk.cache is not None]
            return StoreStats(
                chunks=len(caches),
                tokens=sum(cache.num_tokens for cache in caches),
                nbytes=self._nbytes,
                hits=self._hits,
                misses=self._misses,
                corrupt=self._corrupt,
                ram_hits=self._hits,
                ram_nbytes=self._nbytes,
                evictions=self._evictions,
                max_nbytes=self.max_bytes,
                failed_writes=self.failures.caches,
            )

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """See `ChunkStore.verify`; memory has nothing that could be damaged."""
        return VerifyReport(checked=len(self._chunks), repaired=repair)
