"""Stored caches as one rank needs them: its heads, of a version that all ranks have."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence

from prophetkv_rag.errors import ProphetKVError
from prophetkv_rag.integrations.vllm.heads import own_heads
from prophetkv_rag.integrations.vllm.messages import LoadPlan
from prophetkv_rag.integrations.vllm.runner import VLLMRunner
from prophetkv_rag.store import Behind, CacheIdentity, ChunkCache, Lookup
from prophetkv_rag.store.disk import DiskStore

logger = logging.getLogger(__name__)


class RankCaches:
    """A rank's way into the store; no method raises what a store or a file raises.

    Args:
        store: Of this process.
        runner: Knows the ranks.
        num_kv_heads: The model's, on all ranks.
    """

    def __init__(self, store: DiskStore, runner: VLLMRunner, num_kv_heads: int) -> None:
        self._store = store
        self._runner = runner
        self._num_kv_heads = num_kv_heads

    def find(self, key: str, *, fingerprint: str, input_ids: Sequence[int] | None) -> Lookup:
        """See `ChunkStore`; every rank must call this. What one of them misses, or has otherwise, none has."""
        cache = self._whole(key, fingerprint)
        (is_there,) = self._runner.all_same([_version([cache])])
        if cache is None or not is_there:
            return Lookup(None)
        rows = slice(0, cache.num_tokens)
        return Lookup(own_heads(cache, rows, self._runner, total=self._num_kv_heads))

    def known(self, keys: Iterable[str]) -> set[str]:
        """See `ChunkStore`: `find` gives no cache that bears the trace of what is not known."""
        return set(keys)

    def behind(self, key: str) -> Behind:
        """See `ChunkStore`."""
        return self._store.behind(key)

    def load(
        self, loads: Sequence[LoadPlan], identity: CacheIdentity, opening: CacheIdentity
    ) -> tuple[list[list[ChunkCache] | None], list[str]]:
        """Return for each request its chunks' caches, or `None`; and the keys of those that are missing or bad.

        Every rank must call this.
        """
        lost: list[str] = []
        found = [self._of(load, identity, opening, lost) for load in loads]
        agreed = self._runner.all_same([0 if caches is None else _version(caches) for caches in found])
        taken: list[list[ChunkCache] | None] = []
        for load, caches, is_there in zip(loads, found, agreed, strict=True):
            taken.append(self._cut(load, caches) if is_there and caches is not None else None)
        return taken, lost

    def _cut(self, load: LoadPlan, caches: Sequence[ChunkCache]) -> list[ChunkCache]:
        return [
            own_heads(
                cache,
                slice(match.skipped, match.skipped + match.stop - match.start),
                self._runner,
                total=self._num_kv_heads,
            )
            for cache, match in zip(caches, load.matches, strict=True)
        ]

    def _of(
        self, load: LoadPlan, identity: CacheIdentity, opening: CacheIdentity, lost: list[str]
    ) -> list[ChunkCache] | None:
        caches = []
        for number, (match, behind) in enumerate(zip(load.matches, load.behind, strict=True)):
            is_second = number == 0 and bool(load.first_key)
            key, whose = (load.first_key, opening) if is_second else (match.key, identity)
            cache = self._whole(key, whose.fingerprint, behind)
            if cache is not None and cache.behind.keys != behind:
                return None  # encoded anew since the prompt was planned: the next one is planned with that
            wanted = list(load.input_ids[match.start : match.stop])
            rows = slice(match.skipped, match.skipped + len(wanted))
            if cache is None or not cache.is_of(identity.dtype) or cache.input_ids[rows].tolist() != wanted:
                if not is_second:
                    lost.append(key)
                return None
            caches.append(cache)
        return caches

    def _whole(self, key: str, fingerprint: str, behind: Sequence[str] | None = None) -> ChunkCache | None:
        """Return a cache with all heads, whose traces are all known; if not behind these chunks, as it is on disk."""
        try:
            cache = self._store.find(key, fingerprint=fingerprint, input_ids=None).cache
            if cache is not None and behind is not None and cache.behind.keys != tuple(behind):
                self._store.drop_from_memory([key])  # another one was stored in its place
                cache = self._store.find(key, fingerprint=fingerprint, input_ids=None).cache
            if cache is None:
                return None
            traces = set(cache.behind.traces)
            if traces and len(self._store.known(traces)) < len(traces):
                self._store.drop_caches([key])
                return None
        except (ProphetKVError, OSError) as error:
            logger.warning("the cache %s cannot be read: %s", key, error)
            return None
        return cache


def _version(caches: Sequence[ChunkCache | None]) -> int:
    """Return a number that tells caches of the same chunks apart by what they were encoded behind; 0 if one misses."""
    if any(cache is None for cache in caches):
        return 0
    digest = hashlib.sha256()
    for cache in caches:
        assert cache is not None
        digest.update("|".join((*cache.behind.keys, "", *cache.behind.through, ";")).encode())
    return int.from_bytes(digest.digest()[:7], "big") + 1
