"""What a store on disk knows of its chunks without looking at blobs: the half of `DiskStore` that is the catalog's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from prophetkv_rag.errors import BlobError, InputError, StoreError
from prophetkv_rag.store import ALONE, Behind, ChunkStore, DirectoryLock, EntryColumns, Policy, TextEntry, check_key
from prophetkv_rag.store.blobs import BlobFiles
from prophetkv_rag.store.catalog import Catalog, CatalogRow
from prophetkv_rag.store.disk.leases import Leases
from prophetkv_rag.store.disk.ram import RamTier
from prophetkv_rag.store.disk.write_behind import WriteBehind
from prophetkv_rag.store.remote import RemoteTier

_LOOKED_AT = 64
"""Caches that were absent when they were listed are looked for again, so many at each call."""
_MOST_ABSENT = 100_000


class CatalogedStore(ChunkStore):
    """Chunks, the texts they are recognised by, and who refers to them.

    Attributes:
        directory: Where all of it is.
        policy: See `DiskStore`.
        files: The blobs.
        catalog: The list.
        directory_lock: Held while something is written, alone while something is deleted.
        leases: What is being loaded or written.
        remote: The tier behind the disk, in a `TieredStore`.
    """

    directory: Path
    policy: Policy
    files: BlobFiles
    catalog: Catalog
    directory_lock: DirectoryLock
    leases: Leases
    remote: RemoteTier | None = None
    _seen: dict[str, int]
    _listed: dict[str, int]
    _absent: dict[str, dict[str, None]]
    _deletes: int
    _later: WriteBehind
    _ram: RamTier

    @abstractmethod
    def drop_from_memory(self, keys: Iterable[str]) -> None:
        """Forget caches that this process holds in RAM or is about to write."""

    def seal(self, name: str, data: bytes) -> bytes:
        """See `ChunkStore.seal`."""
        if self.files.locked_by is not None:
            raise StoreError(self.files.locked_by)
        return self.files.seal(name, data)

    def unseal(self, name: str, data: bytes) -> bytes:
        """See `ChunkStore.unseal`."""
        return self.files.unseal(name, data)

    def keys_in_ram(self) -> set[str]:
        """Keys of the caches that this process holds in RAM now."""
        return set(self._ram.keys())

    def keep_in_ram(self, keys: Iterable[str]) -> None:
        """Drop others from RAM before these, where they are there."""
        for key in keys:
            self._ram.use(key)

    def knows(self, key: str) -> bool:
        """See `ChunkStore.knows`."""
        return key in self.catalog

    def known(self, keys: Iterable[str]) -> set[str]:
        """See `ChunkStore.known`."""
        keys = list(keys)
        return self.catalog.known(keys) if keys else set()

    def behind(self, key: str) -> Behind:
        """See `ChunkStore.behind`."""
        try:
            return self.catalog.behind(key)
        except StoreError:  # opened read-only, and made by an older version
            return ALONE

    def followed(self, keys: Iterable[str]) -> set[str]:
        """See `ChunkStore.followed`."""
        return self.catalog.followed(list(keys))

    def note(self, key: str, *, fingerprint: str, num_tokens: int, entry: TextEntry | None) -> None:
        """See `ChunkStore.note`."""
        if self.policy != "read_only":
            with self.directory_lock.shared():
                self.catalog.upsert(CatalogRow(check_key(key), fingerprint, num_tokens, 0), entry)

    def describe(self, fingerprint: str, *, model: str, namespace: str, seconds_per_token: float | None) -> None:
        """See `ChunkStore.describe`."""
        if self.policy != "read_only":
            self.catalog.describe(fingerprint, model, namespace, seconds_per_token)

    def delete(self, keys: Iterable[str]) -> None:
        """See `ChunkStore.delete`."""
        self._must_be_writable("delete caches")
        keys = [check_key(key) for key in keys]
        with self.directory_lock.exclusive(), self.catalog.transaction() as run:
            count, traced = self.catalog.delete(run, keys)
            self._forget([*keys, *traced])
        self._deleted([*keys, *traced], count)

    def add_references(self, owner: str, keys: Iterable[str]) -> None:
        """See `ChunkStore.add_references`."""
        keys = [check_key(key) for key in keys]
        if self.policy != "read_only":
            self.catalog.add_references(owner, keys)

    def keep_with(self, key: str, chunk: str) -> None:
        """See `ChunkStore.keep_with`: the thread that writes the cache notes it before."""
        if self.policy != "read_only":
            self._later.run(self.catalog.keep_with, check_key(key), chunk)

    def drop_references(self, owner: str, keys: Iterable[str]) -> list[str]:
        """See `ChunkStore.drop_references`."""
        self._must_be_writable("delete caches")
        keys = [check_key(key) for key in keys]
        with self.directory_lock.exclusive(), self.catalog.transaction() as run:
            unreferenced = self.catalog.unreferenced_without(run, owner, keys)
            count, traced = self.catalog.delete(run, unreferenced)
            self._forget([*unreferenced, *traced])
        self._deleted([*unreferenced, *traced], count)
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

    def new_chunks(self, fingerprint: str) -> Iterator[tuple[str, list[int]]]:
        """See `ChunkStore.new_chunks`: of those whose cache is there now."""
        keys, self._listed[fingerprint] = self.catalog.keys_after(fingerprint, self._listed.get(fingerprint, 0))
        absent = self._absent.setdefault(fingerprint, {})
        for key in [*list(absent)[:_LOOKED_AT], *keys]:
            absent.pop(key, None)
            try:
                ids = self.files.read_token_ids(key, fingerprint=fingerprint)
            except (BlobError, OSError):  # evicted, or not computed yet: the last in turn now
                absent[key] = None
            else:
                yield key, ids
        while len(absent) > _MOST_ABSENT:
            del absent[next(iter(absent))]

    def _forget(self, keys: Sequence[str]) -> None:
        self.drop_from_memory(keys)
        self.files.remove(keys)

    def _deleted(self, keys: Sequence[str], count: int) -> None:
        self._deletes += count  # only those of others are looked for
        self.drop_from_memory(keys)  # also what a query was just reading, as it saw the chunk until now

    def _must_be_writable(self, action: str) -> None:
        if self.policy == "read_only":
            msg = f"cannot {action} in {self.directory}: it was opened with policy='read_only'"
            raise InputError(msg)

    def _entries_after(self, fingerprint: str, row_id: int) -> EntryColumns:
        found, self._seen[fingerprint] = self.catalog.entries(fingerprint, after_id=row_id)
        return found
