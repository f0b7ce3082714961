"""Chunk caches in this process's RAM: for ephemeral collections, tests and trials."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prophetkv_rag.chunk_cache import ChunkCache
from prophetkv_rag.store.base import ChunkStore, StoreStats, TextEntry, VerifyReport
from prophetkv_rag.store.keys import check_key
from prophetkv_rag.store.ram import has_ids, owned

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Chunk:
    cache: ChunkCache
    fingerprint: str
    entry: TextEntry | None


class MemoryStore(ChunkStore):
    """Keeps every cache until it is deleted; nothing is bounded and nothing survives the process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._chunks: dict[str, _Chunk] = {}
        self._owners: dict[str, set[str]] = {}
        self._hits = self._misses = self._corrupt = 0

    def get(self, key: str, *, fingerprint: str, input_ids: Sequence[int]) -> tuple[ChunkCache | None, bool]:
        """See `ChunkStore.get`."""
        check_key(key)
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is None:
                self._misses += 1
                return None, False
            if chunk.fingerprint == fingerprint and has_ids(chunk.cache, input_ids):
                self._hits += 1
                return chunk.cache, False
            logger.warning("dropped the chunk cache %s: it is another model's or another text's", key)
            del self._chunks[key]
            self._corrupt += 1
            return None, True

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
            known = self._chunks.get(key)
            if known is None:
                self._chunks[key] = _Chunk(owned(cache), fingerprint, entry)
            elif entry is not None:
                known.entry = entry

    def __contains__(self, key: str) -> bool:
        return key in self._chunks

    def delete(self, keys: Iterable[str]) -> None:
        """See `ChunkStore.delete`."""
        with self._lock:
            for key in keys:
                self._chunks.pop(key, None)
                self._owners.pop(key, None)

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
            caches = [chunk.cache for chunk in self._chunks.values()]
            return StoreStats(
                chunks=len(caches),
                tokens=sum(cache.num_tokens for cache in caches),
                nbytes=sum(cache.nbytes for cache in caches),
                hits=self._hits,
                misses=self._misses,
                corrupt=self._corrupt,
                ram_hits=self._hits,
                ram_nbytes=sum(cache.nbytes for cache in caches),
                failed_writes=self.failures.caches,
            )

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """See `ChunkStore.verify`; memory has nothing that could be damaged."""
        return VerifyReport(checked=len(self._chunks), repaired=repair)
