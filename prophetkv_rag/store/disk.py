"""Chunk caches on disk with a RAM tier in front: one blob per chunk, a catalog, and a lock between processes.

    <directory>/catalog.sqlite        which chunks there are, how their texts are recognised, who refers to them
    <directory>/blobs/ab/<key>.safetensors
    <directory>/lock

A blob is written before its catalog row and deleted after it, so a crash leaves at worst a file that nothing knows.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from prophetkv_rag.chunk_cache import ChunkCache
from prophetkv_rag.errors import BlobError, StoreError
from prophetkv_rag.store.base import ChunkStore, StoreStats, TextEntry, VerifyReport
from prophetkv_rag.store.blob import decode_blob, encode_blob
from prophetkv_rag.store.catalog import Catalog, CatalogRow
from prophetkv_rag.store.files import DirectoryLock, make_private_directory, read_file, write_file
from prophetkv_rag.store.keys import check_key, is_key
from prophetkv_rag.store.ram import RamTier, owned

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"


class DiskStore(ChunkStore):
    """Several stores, also of several processes, may use one directory at the same time.

    Blobs are read into private memory, never mapped, so a file that changes later cannot change a cache in use.

    Args:
        directory: Made if it is not there. It holds what the chunks say: only its owner may read it.
        ram_bytes: Upper bound of the RAM tier in K/V bytes; 0 for none.

    Raises:
        StoreError: If the directory cannot be written to or its catalog cannot be used.
    """

    def __init__(self, directory: str | Path, ram_bytes: int = 1 << 30) -> None:
        self.directory = Path(directory).absolute()  # a relative one would move with the working directory
        self._blobs = self.directory / "blobs"
        self._ram = RamTier(ram_bytes)
        self._directory_lock = DirectoryLock(self.directory / "lock")
        self._counter_lock = threading.Lock()
        self._hits = self._misses = self._corrupt = 0
        self._logged: set[str] = set()
        self._seen: dict[str, int] = {}
        try:
            make_private_directory(self.directory)
            make_private_directory(self._blobs)
            with self._directory_lock.exclusive():  # two processes must not both make the tables
                self._catalog = Catalog(self.directory / "catalog.sqlite")
        except OSError as error:
            msg = f"cannot use {self.directory} for chunk caches: {error}; give a directory that can be written to"
            raise StoreError(msg) from error

    def get(self, key: str, *, fingerprint: str, input_ids: Sequence[int]) -> tuple[ChunkCache | None, bool]:
        """See `ChunkStore.get`."""
        path = self._path(key)
        cache = self._ram.get(key, fingerprint=fingerprint, input_ids=input_ids)
        if cache is None:
            try:
                cache = decode_blob(read_file(path), key=key, fingerprint=fingerprint, input_ids=input_ids)
            except FileNotFoundError:
                self._count(misses=1)
                return None, False
            except BlobError as error:
                cache = self._drop_if_bad(key, fingerprint=fingerprint, input_ids=input_ids)
                if cache is None:
                    self._report_corrupt(key, error)
                    return None, True
            except OSError as error:  # not readable now, which says nothing about the blob
                self._report_corrupt(key, error)
                return None, True
            self._ram.put(key, cache, fingerprint=fingerprint)
        self._count(hits=1)
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
        """See `ChunkStore.put`.

        Raises:
            StoreError: If it cannot be written (disk full, directory gone).
        """
        path = self._path(key)
        try:
            with self._directory_lock.shared():  # nothing is deleted meanwhile
                if if_referenced and not self._catalog.has_references(key):
                    return
                cache = owned(cache)
                if not path.exists():
                    write_file(path, encode_blob(cache, key=key, fingerprint=fingerprint))
                self._catalog.upsert(CatalogRow(key, fingerprint, cache.num_tokens, path.stat().st_size), entry)
        except OSError as error:
            msg = f"cannot write the chunk cache {path}: {error}"
            raise StoreError(msg) from error
        self._ram.put(key, cache, fingerprint=fingerprint)

    def __contains__(self, key: str) -> bool:
        return is_key(key) and self._path(key).exists() and key in self._catalog

    def delete(self, keys: Iterable[str]) -> None:
        """See `ChunkStore.delete`."""
        keys = [check_key(key) for key in keys]
        with self._directory_lock.exclusive():
            self._catalog.delete(keys)
            self._remove_blobs(keys)

    def add_references(self, owner: str, keys: Iterable[str]) -> None:
        """See `ChunkStore.add_references`."""
        self._catalog.add_references(owner, [check_key(key) for key in keys])

    def drop_references(self, owner: str, keys: Iterable[str]) -> list[str]:
        """See `ChunkStore.drop_references`."""
        keys = [check_key(key) for key in keys]
        with self._directory_lock.exclusive():
            unreferenced = self._catalog.drop_references(owner, keys)
            self._remove_blobs(unreferenced)
        return unreferenced

    def references(self, owner: str) -> list[str]:
        """Keys that `owner` refers to."""
        return self._catalog.references(owner)

    def entries(self, fingerprint: str) -> Iterator[tuple[str, TextEntry]]:
        """See `ChunkStore.entries`."""
        return self._entries_after(fingerprint, 0)

    def new_entries(self, fingerprint: str) -> Iterator[tuple[str, TextEntry]]:
        """See `ChunkStore.new_entries`; rows that this store itself added since then are among them."""
        return self._entries_after(fingerprint, self._seen.get(fingerprint, 0))

    def stats(self) -> StoreStats:
        """See `ChunkStore.stats`; `nbytes` is the size on disk."""
        chunks, tokens, nbytes = self._catalog.totals()
        with self._counter_lock:
            hits, misses, corrupt = self._hits, self._misses, self._corrupt
        return StoreStats(chunks, tokens, nbytes, hits, misses, corrupt, location=str(self.directory))

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """Read and check every blob.

        `orphans` are blobs that the catalog does not know (their keys) and other files, such as what a killed process
        left half written (their names). With `repair`, bad blobs and orphans are deleted. The chunks of bad and
        missing blobs stay recognised in prompts, and are computed again when they are next needed.
        """
        rows = self._catalog.rows()
        faults = [(row, fault) for row in rows if (fault := self._fault(row)) is not None]
        with self._directory_lock.exclusive():  # nothing is being written now
            faults = [(row, fault) for row, _ in faults if (fault := self._fault(row)) is not None]
            known = {self._path(row.key) for row in self._catalog.rows()}
            orphans = [path for path in sorted(self._blobs.rglob("*")) if path.is_file() and path not in known]
            if repair:
                for row, _ in faults:
                    self._drop_blob(row.key)
                for path in orphans:
                    path.unlink(missing_ok=True)
        return VerifyReport(
            checked=len(rows),
            bad=tuple(row.key for row, fault in faults if fault == "bad"),
            missing=tuple(row.key for row, fault in faults if fault == "missing"),
            orphans=tuple(path.stem if is_key(path.stem) else path.name for path in orphans),
            repaired=repair,
        )

    def close(self) -> None:
        """See `ChunkStore.close`."""
        self._catalog.close()

    def _path(self, key: str) -> Path:
        return self._blobs / check_key(key)[:2] / f"{key}{_SUFFIX}"

    def _entries_after(self, fingerprint: str, row_id: int) -> Iterator[tuple[str, TextEntry]]:
        found = self._catalog.entries(fingerprint, after_id=row_id)
        if found:
            self._seen[fingerprint] = found[-1][0]
        return iter([(key, entry) for _, key, entry in found])

    def _fault(self, row: CatalogRow) -> str | None:
        try:
            decode_blob(read_file(self._path(row.key)), key=row.key, fingerprint=row.fingerprint)
        except FileNotFoundError:
            return "missing" if row.nbytes else None
        except (BlobError, OSError):
            return "bad"
        return None

    def _drop_if_bad(self, key: str, *, fingerprint: str, input_ids: Sequence[int]) -> ChunkCache | None:
        """Delete a blob that was found bad, unless somebody has replaced it since: then return what it holds now."""
        try:
            with self._directory_lock.exclusive():
                try:
                    return decode_blob(
                        read_file(self._path(key)), key=key, fingerprint=fingerprint, input_ids=input_ids
                    )
                except FileNotFoundError:
                    return None
                except BlobError:
                    self._drop_blob(key)
        except OSError:
            logger.debug("could not look at the chunk cache %s again", key, exc_info=True)
        return None

    def _drop_blob(self, key: str) -> None:
        try:
            self._remove_blobs([key])
            self._catalog.mark_lost(key)
        except (OSError, StoreError):
            logger.debug("could not remove the chunk cache %s", key, exc_info=True)

    def _remove_blobs(self, keys: Iterable[str]) -> None:
        self._ram.drop(keys)
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def _report_corrupt(self, key: str, reason: Exception) -> None:
        with self._counter_lock:
            self._corrupt += 1
            is_new = key not in self._logged
            self._logged.add(key)
        if is_new:
            logger.warning("the chunk cache %s cannot be used and is computed again: %s", self._path(key), reason)

    def _count(self, *, hits: int = 0, misses: int = 0) -> None:
        with self._counter_lock:
            self._hits += hits
            self._misses += misses
