"""Chunk caches on disk with a RAM tier in front: one blob per chunk, a catalog, and locks between processes.

    <directory>/catalog.sqlite      which chunks there are, how their texts are recognised, their owners, their use
    <directory>/blobs/, incoming/   see `blob_files`
    <directory>/leases/             what is being loaded, see `leases`
    <directory>/lock, space.lock    held while something is written, deleted; while room is made

A blob is written before its catalog row says that it is there and removed before the row says that it is gone, so a
crash leaves at worst a file that nothing knows, which the next opening removes, or a row whose blob is computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prophetkv_rag.chunk_cache import ChunkCache
from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.store.base import ChunkStore, EntryColumns, Policy, StoreStats, TextEntry, VerifyReport
from prophetkv_rag.store.blob import decode_blob, encode_blob
from prophetkv_rag.store.blob_files import BlobFiles
from prophetkv_rag.store.blob_reader import BlobReader
from prophetkv_rag.store.catalog import CatalogRow
from prophetkv_rag.store.disk_parts import Counters, Later, check_settings, open_catalog
from prophetkv_rag.store.encryption import KeySource, load_key
from prophetkv_rag.store.files import DirectoryLock, can_write
from prophetkv_rag.store.formats import BlobFormat, check_format
from prophetkv_rag.store.keys import check_key, is_key
from prophetkv_rag.store.leases import Leases
from prophetkv_rag.store.ram import RamTier, owned
from prophetkv_rag.store.ranking import Eviction, Ranking
from prophetkv_rag.store.read_ahead import ReadAhead
from prophetkv_rag.store.space import Space
from prophetkv_rag.store.statistics import add_counts

if TYPE_CHECKING:
    from prophetkv_rag.store.remote import RemoteTier

logger = logging.getLogger(__name__)


class DiskStore(ChunkStore):
    """Several stores, also of several processes, may use one directory at the same time.

    Blobs are read into private memory, never mapped, so a file that changes later cannot change a cache in use.

    Args:
        directory: Made if it is not there. It holds what the chunks say: only its owner may read it.
        ram_bytes: Upper bound of the RAM tier in K/V bytes; 0 for none.
        max_bytes: Upper bound of all blobs on disk, kept to at every moment by every store that is given one; `None`
            for none. What does not fit is computed when a prompt needs it, and what is used most wins the space.
        policy: `"eager"` stores caches as chunks are added, until the disk tier is full; `"on_first_use"` when a prompt
            first has them; `"read_only"` never, and changes nothing at all (the directory need not be writable).
        eviction: What goes first where room is needed: the lowest `"value"` (see `ranking`), or `"lru"`.
        blob_format: How blobs are written (see `formats`); blobs of another lossy format are computed again.
        encryption_key: Blobs are encrypted with it, and others are not used: 32 bytes, or the path of a private file
            with them; `None` for what the environment variable `PROPHETKV_CACHE_KEY` says, if anything.

    Raises:
        InputError: If a setting is not one of those.
        StoreError: If the directory cannot be used.
    """

    remote: RemoteTier | None = None  # the tier behind the disk, in a `TieredStore`

    def __init__(
        self,
        directory: str | Path,
        ram_bytes: int = 1 << 30,
        *,
        max_bytes: int | None = None,
        policy: Policy = "eager",
        eviction: Eviction = "value",
        blob_format: BlobFormat = "exact",
        encryption_key: KeySource = None,
    ) -> None:
        check_settings(max_bytes=max_bytes, policy=policy, eviction=eviction)
        self.directory = Path(directory).absolute()  # a relative one would move with the working directory
        self.policy = policy
        self.blob_format = check_format(blob_format)
        self.max_bytes = max_bytes
        self.files = BlobFiles(self.directory, load_key(encryption_key))
        self.leases = Leases(self.directory / "leases", is_shared=policy != "read_only")
        self.directory_lock = DirectoryLock(self.directory / "lock")
        self._ram = RamTier(ram_bytes)
        self._counters = Counters()
        self._seen: dict[str, int] = {}
        self._later = Later(self._put_referenced, self.failures)
        self.catalog = open_catalog(self.directory, self.files, self.directory_lock, read_only=policy == "read_only")
        lock = None if policy == "read_only" else self.directory_lock
        self._reader = BlobReader(
            self.files, self.catalog, lock, self._counters, self.drop_from_memory, blob_format=self.blob_format
        )
        self._read_ahead = ReadAhead(self.files, self.catalog, self._ram, self.blob_format)
        self.space = Space(
            self.catalog, self.files, self.leases, Ranking(eviction), max_bytes, self.directory, self._counters
        )
        if policy != "read_only":
            self.space.adopt()

    def get(self, key: str, *, fingerprint: str, input_ids: Sequence[int]) -> tuple[ChunkCache | None, bool]:
        """See `ChunkStore.get`."""
        self.files.path(key)  # a key that is none is an error
        if self.policy != "read_only" and self.space.use(key):
            self._later.run(self._save_counts)
        cache = self._ram.get(key, fingerprint=fingerprint, input_ids=input_ids)
        if cache is None:
            cache = self._later.get(key, fingerprint=fingerprint, input_ids=input_ids)
        ram_hits = int(cache is not None)
        if cache is None:
            cache, was_corrupt = self._reader.read(key, fingerprint=fingerprint, input_ids=input_ids)
            if cache is None:
                return None, was_corrupt
            self._ram.put(key, cache, fingerprint=fingerprint)
        self._counters.add(hits=1, ram_hits=ram_hits)
        return cache, False

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
        cache = owned(cache)
        if self.policy == "read_only" or self.files.locked_by is not None:
            self._ram.put(key, cache, fingerprint=fingerprint)
            return
        try:
            with self.directory_lock.shared():  # nothing is deleted meanwhile
                if if_referenced and not self.catalog.has_references(key):
                    return
                row = CatalogRow(key, fingerprint, cache.num_tokens, 0)
                if path.exists():
                    self.space.note_written(row, entry, path.stat().st_size, is_used=if_referenced)
                else:
                    entry = entry or self.catalog.entry_of(key)
                    plain = encode_blob(
                        cache, key=key, fingerprint=fingerprint, blob_format=self.blob_format, entry=entry
                    )
                    data = self.files.seal(key, plain)
                    is_kept = self.space.write(row, entry, data, is_used=if_referenced)
                    if is_kept and self.blob_format != "exact" and self._ram.max_bytes:  # what the disk will give later
                        cache = decode_blob(plain, key=key, fingerprint=fingerprint, packed=self.files.keeps_packed)
                self._ram.put(key, cache, fingerprint=fingerprint)
        except (OSError, StoreError) as error:
            self._ram.put(key, cache, fingerprint=fingerprint)  # better than nothing, and gone with the process
            msg = f"cannot write the chunk cache {path}: {error}"
            raise StoreError(msg) from error
        self.failures.end()

    def read_ahead(self, keys: Iterable[str], *, fingerprint: str) -> None:
        """See `ChunkStore.read_ahead`: a thread reads them into the RAM tier."""
        self._later.run(self._read_ahead, [key for key in keys if is_key(key)], fingerprint)

    def pin_memory(self) -> None:
        """See `ChunkStore.pin_memory`."""
        self._ram.pins = self.files.keeps_packed = True  # a GPU's kernels unpack on the way

    def put_soon(self, key: str, cache: ChunkCache, *, fingerprint: str) -> None:
        """See `ChunkStore.put_soon`: a thread writes it; until then `get` finds it all the same."""
        if self.policy == "read_only":
            self._ram.put(key, owned(cache), fingerprint=fingerprint)
        else:
            self._later.add(check_key(key), owned(cache), fingerprint)

    def flush(self) -> None:
        """See `ChunkStore.flush`."""
        self._later.wait()

    def __contains__(self, key: str) -> bool:
        return is_key(key) and self.files.path(key).exists() and key in self.catalog

    def knows(self, key: str) -> bool:
        """See `ChunkStore.knows`."""
        return key in self.catalog

    def note(self, key: str, *, fingerprint: str, num_tokens: int, entry: TextEntry | None) -> None:
        """See `ChunkStore.note`."""
        if self.policy != "read_only":
            with self.directory_lock.shared():
                self.catalog.upsert(CatalogRow(check_key(key), fingerprint, num_tokens, 0), entry)

    def accepts_new(self, waiting: int = 0) -> bool:
        """See `ChunkStore.accepts_new`."""
        if self.policy != "eager" or self.files.locked_by is not None or not self.space.has_room(waiting):
            return False
        return not self.failures.is_failing or can_write(self.files.incoming, self.space.typical)

    def lease(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """See `ChunkStore.lease`."""
        return nullcontext() if self.policy == "read_only" else self.leases.hold(keys)

    def describe(self, fingerprint: str, *, model: str, namespace: str, seconds_per_token: float | None) -> None:
        """See `ChunkStore.describe`."""
        if self.policy != "read_only":
            self.catalog.describe(fingerprint, model, namespace, seconds_per_token)

    def delete(self, keys: Iterable[str]) -> None:
        """See `ChunkStore.delete`."""
        self._must_be_writable("delete caches")
        keys = [check_key(key) for key in keys]
        with self.directory_lock.exclusive(), self.catalog.transaction() as run:
            self.catalog.delete(run, keys)
            self._forget(keys)

    def add_references(self, owner: str, keys: Iterable[str]) -> None:
        """See `ChunkStore.add_references`."""
        keys = [check_key(key) for key in keys]
        if self.policy != "read_only":
            self.catalog.add_references(owner, keys)

    def drop_references(self, owner: str, keys: Iterable[str]) -> list[str]:
        """See `ChunkStore.drop_references`."""
        self._must_be_writable("delete caches")
        keys = [check_key(key) for key in keys]
        with self.directory_lock.exclusive(), self.catalog.transaction() as run:
            unreferenced = self.catalog.unreferenced_without(run, owner, keys)
            self.catalog.delete(run, unreferenced)
            self._forget(unreferenced)
        return unreferenced

    def references(self, owner: str) -> list[str]:
        """Keys that `owner` refers to."""
        return self.catalog.references(owner)

    def entries(self, fingerprint: str) -> Iterator[tuple[str, TextEntry]]:
        """See `ChunkStore.entries`."""
        return self._entries_after(fingerprint, 0).pairs()

    def entry_columns(self, fingerprint: str) -> EntryColumns:
        """See `ChunkStore.entry_columns`."""
        return self._entries_after(fingerprint, 0)

    def new_entries(self, fingerprint: str) -> Iterator[tuple[str, TextEntry]]:
        """See `ChunkStore.new_entries`; rows that this store itself added since then are among them."""
        return self._entries_after(fingerprint, self._seen.get(fingerprint, 0)).pairs()

    def stats(self) -> StoreStats:
        """See `ChunkStore.stats`; `nbytes` is the size on disk."""
        counts: dict[str, Any] = {"failed_writes": self.failures.caches, "ram_nbytes": self._ram.nbytes}
        counts |= {**self._counters.values(), "location": str(self.directory), "max_nbytes": self.max_bytes}
        return StoreStats(*self.catalog.totals(), **counts)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """See `upkeep.verify`."""
        from prophetkv_rag.store.upkeep import verify

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

    def _forget(self, keys: Sequence[str]) -> None:
        self.drop_from_memory(keys)
        self.files.remove(keys)

    def _must_be_writable(self, action: str) -> None:
        if self.policy == "read_only":
            msg = f"cannot {action} in {self.directory}: it was opened with policy='read_only'"
            raise InputError(msg)

    def _put_referenced(self, key: str, cache: ChunkCache, fingerprint: str) -> None:
        self.put(key, cache, fingerprint=fingerprint, if_referenced=True)

    def _save_counts(self) -> None:
        self.space.flush_uses()
        self._counters.save(partial(add_counts, self.catalog), failed_writes=self.failures.caches)

    def _entries_after(self, fingerprint: str, row_id: int) -> EntryColumns:
        found, self._seen[fingerprint] = self.catalog.entries(fingerprint, after_id=row_id)
        return found
