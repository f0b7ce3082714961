"""The caches that the next chunks stand behind, as long as they are needed and fit."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from prophetkv_rag.store import ChunkCache


class RecentCaches:
    """Caches by key; what is above `max_bytes` of K/V leaves when `trim` is called, the least recently used first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._caches: OrderedDict[str, ChunkCache] = OrderedDict()
        self._nbytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._caches

    def get(self, key: str) -> ChunkCache | None:
        """Return a cache that is held."""
        if key not in self._caches:
            return None
        self._caches.move_to_end(key)
        return self._caches[key]

    def put(self, key: str, cache: ChunkCache) -> None:
        """Hold a cache."""
        self.drop(key)
        self._caches[key] = cache
        self._nbytes += cache.nbytes

    def expect(self, uses: Iterable[Iterable[str]]) -> Uses:
        """Say how often which keys will be needed from now on; what is not any more is let go."""
        return Uses(self, Counter(key for keys in uses for key in keys))

    def trim(self) -> None:
        """Let go of what is above the limit."""
        while self._nbytes > self.max_bytes:
            self.drop(next(iter(self._caches)))

    def drop(self, key: str) -> None:
        """Let go of a cache, if it is held."""
        cache = self._caches.pop(key, None)
        self._nbytes -= 0 if cache is None else cache.nbytes


class Uses:
    """How often held caches will still be needed."""

    def __init__(self, caches: RecentCaches, counts: Counter[str]) -> None:
        self._caches = caches
        self._counts = counts

    def is_wanted(self, key: str) -> bool:
        """Whether the cache of `key` will be needed."""
        return self._counts[key] > 0

    def used(self, keys: Iterable[str]) -> None:
        """Count one use of each; what is needed no more is let go."""
        keys = list(keys)
        for key in keys:
            self._counts[key] -= 1
            if self._counts[key] <= 0:
                self._caches.drop(key)
