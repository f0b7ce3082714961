"""Chunk caches on disk with a RAM tier in front: one blob per chunk, a catalog, and locks between processes.

    <directory>/catalog.sqlite      which chunks there are, how their texts are recognised, their owners, their use
    <directory>/blobs/, incoming/   see `blobs.files`
    <directory>/leases/             what is being loaded, see `leases`
    <directory>/lock, space.lock    held while something is written, deleted; while room is made

A blob is written before its catalog row says that it is there and removed before the row says that it is gone, so a
crash leaves at worst a file that nothing knows, which the next opening removes, or a row whose blob is computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from prophetkv_rag.errors import StoreError
from prophetkv_rag.store import (
    ChunkCache,
    DirectoryLock,
    Lookup,
    Policy,
    StoreStats,
    TextEntry,
    VerifyReport,
    can_write,
    check_key,
    is_key,
)
from prophetkv_rag.store.blobs import BlobFiles, BlobFormat, check_format
from prophetkv_rag.store.catalog import Eviction, Ranking, add_counts, all_deletions
from prophetkv_rag.store.disk.cataloged import CatalogedStore
from prophetkv_rag.store.disk.counters import Counters
from prophetkv_rag.store.disk.directory import open_catalog
from prophetkv_rag.store.disk.leases import Leases
from prophetkv_rag.store.disk.ram import RamTier
from prophetkv_rag.store.disk.read_ahead import ReadAhead
from prophetkv_rag.store.disk.reader import BlobReader
from prophetkv_rag.store.disk.settings import check_settings
from prophetkv_rag.store.disk.space import Limits, Space
from prophetkv_rag.store.disk.stale import drop_stale
from prophetkv_rag.store.disk.upkeep import verify
from prophetkv_rag.store.disk.write_behind import WriteBehind
from prophetkv_rag.store.disk.writer import BlobWriter
from prophetkv_rag.store.encryption import KeySource, load_key

logger = logging.getLogger(__name__)


class DiskStore(CatalogedStore):
    """Several stores, also of several processes, may use one directory at the same time.

    Blobs are read into private memory, never mapped, so a file that changes later cannot change a cache in use.

    Args:
        directory: Made if it is not there. It holds what the chunks say: only its owner may read it.
        ram_bytes: Upper bound of the RAM tier in K/V bytes; 0 for none, `None` for a quarter of free memory.
        max_bytes: Upper bound of all blobs on disk, kept to at every moment by every store that is given one; `None`
            for none. What does not fit is computed when a prompt needs it, and what is used most wins the space.
        namespace_max_bytes: The same for the blobs of each namespace (`ProphetKVConfig.namespace`), which evicts its
            own for it; no other's, as long as `max_bytes` is enough for what all of them may have. `None` for none.
        namespace_ram_bytes: The same for the RAM tier.
        policy: `"eager"` stores caches as chunks are added, until the disk tier is full; `"on_first_use"` when a prompt
            first has them; `"read_only"` never, and changes nothing at all (the directory need not be writable).
        eviction: What goes first where room is needed: the lowest `"value"` (see `catalog.ranking`), or `"lru"`.
        blob_format: How blobs are written (see `blobs.formats`); blobs of another lossy format are computed again.
        encryption_key: Blobs are encrypted with it, and others are not used: 32 bytes, or the path of a private file
            with them; `None` for what the environment variable `PROPHETKV_CACHE_KEY` says, if anything.

    Raises:
        InputError: If a setting is not one of those.
        StoreError: If the directory cannot be used.
    """

    def __init__(
        self,
        directory: str | Path,
        ram_bytes: int | None = None,
        *,
        max_bytes: int | None = None,
        namespace_max_bytes: int | None = None,
        namespace_ram_bytes: int | None = None,
        policy: Policy = "eager",
        eviction: Eviction = "value",
        blob_format: BlobFormat = "exact",
        encryption_key: KeySource = None,
    ) -> None:
        check_settings(
            policy,
            eviction,
            max_bytes,
            namespace_max_bytes=namespace_max_bytes,
            namespace_ram_bytes=namespace_ram_bytes,
        )
        self.directory = Path(directory).absolute()  # a relative one would move with the working directory
        self.policy = policy
        self.blob_format = check_format(blob_format)
        self.limits = Limits(max_bytes, namespace_max_bytes)
        self.files = BlobFiles(self.directory, load_key(encryption_key))
        self.leases = Leases(self.directory / "leases", is_shared=policy != "read_only")
        self.directory_lock = DirectoryLock(self.directory / "lock")
        self._ram = RamTier(ram_bytes, namespace_ram_bytes)
        self._counters = Counters()
        self._seen: dict[str, int] = {}
        self._listed: dict[str, int] = {}
        self._absent: dict[str, dict[str, None]] = {}
        self._later = WriteBehind(self._put_referenced, self.failures)
        self.catalog = open_catalog(self.directory, self.files, self.directory_lock, read_only=policy == "read_only")
        self._deletes = all_deletions(self.catalog)
        lock = None if policy == "read_only" else self.directory_lock
        self._reader = BlobReader(
            self.files,
            self.catalog,
            lock,
            self._counters,
            self._ram.drop,
            blob_format=self.blob_format,
            later=self._later.run,
        )
        self._read_ahead = ReadAhead(self.files, self._ram, self._hold, self.blob_format)
        self.space = Space(
            self.catalog, self.files, self.leases, Ranking(eviction), self.limits, self.directory, self._counters
        )
        self._writer = BlobWriter(
            self.files,
            self.catalog,
            self.space,
            self.directory_lock,
            self._ram,
            blob_format=self.blob_format,
            settle=self._reader.settle,
        )
        if policy != "read_only":
            self.space.adopt()

    def find(self, key: str, *, fingerprint: str, input_ids: Sequence[int] | None) -> Lookup:
        """See `ChunkStore.find`."""
        self.files.path(key)  # a key that is none is an error
        if self.policy != "read_only" and self.space.use(key):
            self._later.run(self._save_counts)
        cache = self._ram.get(key, fingerprint=fingerprint, input_ids=input_ids)
        cache = cache or self._later.get(key, fingerprint=fingerprint, input_ids=input_ids)
        if cache is not None:
            self._counters.add(hits=1, ram_hits=1)
            return Lookup(cache, tier="ram")
        cache, was_corrupt = self._reader.read(key, fingerprint=fingerprint, input_ids=input_ids)
        if cache is None:
            return Lookup(was_corrupt=was_corrupt)
        self._hold(key, cache, fingerprint)
        self._counters.add(hits=1)
        return Lookup(cache, tier="disk")

    def reject(self, key: str, *, fingerprint: str, input_ids: Sequence[int], dtype: str) -> None:
        """See `ChunkStore.reject`."""
        self._ram.drop([key])
        self._reader.reject(key, fingerprint=fingerprint, input_ids=input_ids, dtype=dtype)

    def put(
        self,
        key: str,
        cache: ChunkCache,
        *,
        fingerprint: str,
        entry: TextEntry | None = None,
        if_referenced: bool = False,
    ) -> None:
        """See `ChunkStore.put`; where it does not fit and has no value to make room for it, it is only known.

        Raises:
            StoreError: If it cannot be written (disk full, directory gone).
        """
        path = self.files.path(key)
        cache = cache.owned()
        if self.policy == "read_only" or self.files.locked_by is not None:
            self._ram.put(key, cache, fingerprint=fingerprint)
            return
        try:
            self._writer.write(key, cache, fingerprint=fingerprint, entry=entry, if_referenced=if_referenced)
        except (OSError, StoreError) as error:
            self._ram.put(key, cache, fingerprint=fingerprint)  # better than nothing, and gone with the process
            msg = f"cannot write the chunk cache {path}: {error}"
            raise StoreError(msg) from error
        self.failures.end()

    def read_ahead(self, keys: Iterable[str], *, fingerprint: str) -> Future[None] | None:
        """See `ChunkStore.read_ahead`: a thread reads them into the RAM tier."""
        return self._later.run(self._read_ahead, [key for key in keys if is_key(key)], fingerprint)

    def pin_memory(self) -> None:
        """See `ChunkStore.pin_memory`."""
        self._ram.pins = self.files.keeps_packed = True  # a GPU's kernels unpack on the way

    def put_soon(self, key: str, cache: ChunkCache, *, fingerprint: str) -> None:
        """See `ChunkStore.put_soon`: a thread writes it; until then `get` finds it all the same."""
        if self.policy == "read_only":
            self._ram.put(key, cache.owned(), fingerprint=fingerprint)
        else:
            self._later.add(check_key(key), cache.owned(), fingerprint)

    def flush(self) -> None:
        """See `ChunkStore.flush`."""
        self._later.wait()

    def __contains__(self, key: str) -> bool:
        if not is_key(key) or self._reader.is_bad(key):
            return False
        return self.files.path(key).exists() and key in self.catalog

    def accepts_new(self, waiting: int = 0, *, fingerprint: str | None = None) -> bool:
        """See `ChunkStore.accepts_new`."""
        if self.policy != "eager" or self.files.locked_by is not None:
            return False
        if not self.space.has_room(waiting, fingerprint=fingerprint):
            return False
        return not self.failures.is_failing or can_write(self.files.incoming, self.space.typical)

    def lease(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """See `ChunkStore.lease`."""
        return nullcontext() if self.policy == "read_only" else self.leases.hold(keys)

    def describe(self, fingerprint: str, *, model: str, namespace: str, seconds_per_token: float | None) -> None:
        """See `ChunkStore.describe`."""
        self._ram.name(fingerprint, namespace)
        super().describe(fingerprint, model=model, namespace=namespace, seconds_per_token=seconds_per_token)

    def stats(self) -> StoreStats:
        """See `ChunkStore.stats`; `nbytes` is the size on disk."""
        counts: dict[str, Any] = {"failed_writes": self.failures.caches, "ram_nbytes": self._ram.nbytes}
        counts |= {**self._counters.values(), "location": str(self.directory), "max_nbytes": self.limits.all_bytes}
        counts |= {"namespace_max_nbytes": self.limits.namespace_bytes, "ram_max_nbytes": self._ram.max_bytes}
        return StoreStats(*self.catalog.totals(), **counts)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """See `upkeep.verify`."""
        if repair:
            self._must_be_writable("repair")
        return verify(self, repair=repair)

    def close(self) -> None:
        """See `ChunkStore.close`; what `put_soon` took is written first."""
        self._later.close()
        if self.policy != "read_only":
            try:
                self._save_counts()
            except StoreError:
                logger.debug("the last uses of chunk caches were not noted", exc_info=True)
        self.catalog.close()

    def drop_from_memory(self, keys: Iterable[str]) -> None:
        """Forget caches that this process holds in RAM or is about to write."""
        keys = list(keys)
        self._later.drop(keys)
        self._ram.drop(keys)

    def drop_caches(self, keys: Iterable[str]) -> None:
        """See `ChunkStore.drop_caches`: a thread drops the blobs."""
        keys = list(keys)
        self.drop_from_memory(keys)
        if self.policy != "read_only":
            self._later.run(self._drop_traced, keys)

    def _drop_traced(self, keys: Sequence[str]) -> None:
        self._ram.drop(drop_stale(keys, self.files, self.catalog, self.directory_lock))

    def forget_deleted(self) -> None:
        """See `ChunkStore.forget_deleted`."""
        found = all_deletions(self.catalog)
        if found != self._deletes:
            self._deletes = found
            self._later.run(self._drop_unknown)

    def _drop_unknown(self) -> None:
        held = self._ram.keys()
        try:
            known = self.catalog.known(held)
        except StoreError:
            self._deletes -= 1  # for the next time
            return
        self._ram.drop(key for key in held if key not in known)

    def _hold(self, key: str, cache: ChunkCache, fingerprint: str) -> None:
        """Hold in RAM what was read, unless it was deleted meanwhile: deleted means everywhere."""
        self._ram.put(key, cache, fingerprint=fingerprint)
        try:
            if key not in self.catalog:
                self._ram.drop([key])
        except StoreError:
            logger.debug("whether %s is still wanted could not be found out", key, exc_info=True)

    def _put_referenced(self, key: str, cache: ChunkCache, fingerprint: str) -> None:
        self.put(key, cache, fingerprint=fingerprint, if_referenced=True)

    def _save_counts(self) -> None:
        self.space.flush_uses()
        self._counters.save(partial(add_counts, self.catalog), failed_writes=self.failures.caches)
