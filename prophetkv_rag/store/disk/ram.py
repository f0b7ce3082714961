"""The RAM tier: the most recently used chunk caches, up to a number of bytes."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import torch

from prophetkv_rag.forks import around_fork
from prophetkv_rag.store import ChunkCache
from prophetkv_rag.store.disk.room import default_ram_bytes

logger = logging.getLogger(__name__)


class RamTier:
    """Least recently used caches are dropped first. Safe to use from several threads; callers must not write to them.

    Args:
        max_bytes: Upper bound of the K/V bytes held; 0 keeps nothing, `None` is a quarter of the memory that is free
            now. A cache larger than that is not kept.
        namespace_max_bytes: The same for each namespace, which makes room among its own; `None` for none.

    Attributes:
        namespaces: Fingerprint -> namespace, as engines say; a fingerprint that is not there is one by itself.
        pins: Whether caches are copied to page-locked memory, from which a GPU copies while the CPU goes on. Where that
            is not to be had, they are held as they are.
    """

    def __init__(self, max_bytes: int | None, namespace_max_bytes: int | None = None) -> None:
        self.max_bytes = default_ram_bytes() if max_bytes is None else max_bytes
        self.namespace_max_bytes = (
            self.max_bytes if namespace_max_bytes is None else min(self.max_bytes, namespace_max_bytes)
        )
        self.namespaces: dict[str, str] = {}
        self.pins = False
        self._lock = threading.Lock()
        around_fork(self, "_lock")
        self._caches: OrderedDict[str, tuple[str, ChunkCache]] = OrderedDict()
        self._nbytes = 0
        self._of_namespace: Counter[tuple[bool, str]] = Counter()

    @property
    def nbytes(self) -> int:
        """K/V bytes held now."""
        return self._nbytes

    def holds(self, key: str) -> bool:
        """Whether something is held under `key`."""
        with self._lock:
            return key in self._caches

    def use(self, key: str) -> int | None:
        """Make a cache the most recently used one, if it is held; returns its K/V bytes."""
        with self._lock:
            if key not in self._caches:
                return None
            self._caches.move_to_end(key)
            return self._caches[key][1].nbytes

    def keys(self) -> list[str]:
        """What is held."""
        with self._lock:
            return list(self._caches)

    def get(self, key: str, *, fingerprint: str, input_ids: Sequence[int] | None) -> ChunkCache | None:
        """Return the cache if it is held and is the one that is meant."""
        with self._lock:
            found = self._caches.get(key)
            if found is None:
                return None
            self._caches.move_to_end(key)
        cache_fingerprint, cache = found
        return cache if cache_fingerprint == fingerprint and cache.has_ids(input_ids) else None

    def put(self, key: str, cache: ChunkCache, *, fingerprint: str) -> None:
        """Hold a cache, and drop the least recently used ones that no longer fit."""
        self.drop([key])
        if cache.nbytes > self.namespace_max_bytes:
            return
        cache = self._pinned(cache)
        with self._lock:
            if key in self._caches:  # another thread was faster
                return
            self._caches[key] = (fingerprint, cache)
            whose = self._whose(fingerprint)
            self._nbytes += cache.nbytes
            self._of_namespace[whose] += cache.nbytes
            while self._of_namespace[whose] > self.namespace_max_bytes:
                self._drop(next(key for key, (other, _) in self._caches.items() if self._whose(other) == whose))
            while self._nbytes > self.max_bytes:
                self._drop(next(iter(self._caches)))

    def drop(self, keys: Iterable[str]) -> None:
        """Forget these caches, where they are held."""
        with self._lock:
            for key in keys:
                if key in self._caches:
                    self._drop(key)

    def name(self, fingerprint: str, namespace: str) -> None:
        """Say whose a fingerprint's caches are, those that are held included."""
        with self._lock:
            if self.namespaces.get(fingerprint) == namespace:
                return
            self.namespaces[fingerprint] = namespace
            self._of_namespace.clear()
            for other, cache in self._caches.values():
                self._of_namespace[self._whose(other)] += cache.nbytes

    def _whose(self, fingerprint: str) -> tuple[bool, str]:
        namespace = self.namespaces.get(fingerprint)
        return (True, fingerprint) if namespace is None else (False, namespace)

    def _drop(self, key: str) -> None:
        fingerprint, cache = self._caches.pop(key)
        self._nbytes -= cache.nbytes
        self._of_namespace[self._whose(fingerprint)] -= cache.nbytes

    def _pinned(self, cache: ChunkCache) -> ChunkCache:
        if not self.pins:
            return cache
        try:
            return cache.mapped(torch.Tensor.pin_memory)
        except RuntimeError as error:  # no driver, or no more memory that may be locked
            logger.debug("chunk caches are held in memory that is not pinned: %s", error)
            self.pins = False
            return cache
