"""The byte limit of the disk tier: room is made before a blob is written, by evicting what is worth less."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from prophetkv_rag.errors import StoreError
from prophetkv_rag.store.base import TextEntry
from prophetkv_rag.store.blob_files import BlobFiles
from prophetkv_rag.store.catalog import Catalog, CatalogRow
from prophetkv_rag.store.disk_parts import Counters
from prophetkv_rag.store.files import DirectoryLock
from prophetkv_rag.store.leases import Leases
from prophetkv_rag.store.ranking import Ranking

_USES_PER_FLUSH = 64


class Space:
    """Writes blobs within the limit, and counts uses, which decide what stays. Safe to use from several threads.

    An evicted chunk stays in the catalog with its history: its text is still recognised in prompts, and when it is used
    again often enough it comes back.
    """

    def __init__(
        self,
        catalog: Catalog,
        files: BlobFiles,
        leases: Leases,
        ranking: Ranking,
        max_bytes: int | None,
        directory: Path,
        counters: Counters,
    ) -> None:
        self._catalog = catalog
        self._files = files
        self._leases = leases
        self._ranking = ranking
        self._max_bytes = max_bytes
        self._space_lock = DirectoryLock(directory / "space.lock")
        self._counters = counters
        self._lock = threading.Lock()
        self._uses: list[str] = []
        self.typical = 0
        """Size in bytes of the blob written last."""
        self.on_write: Callable[[CatalogRow, bytes, bool], None] | None = None
        """Told about every blob that was to be written, and whether it was; called while no space lock is held."""

    def adopt(self) -> None:
        """Rank the catalog by this store's rule, and evict what is above its limit (which may be a new one)."""
        with self._catalog.transaction() as run:
            self._ranking.adopt(run)
        if self._max_bytes is not None and self._catalog.nbytes() > self._max_bytes:
            with self._space_lock.exclusive():
                self._evict(self._catalog.nbytes() - self._max_bytes, rank=math.inf, spared=self._leases.held())

    def use(self, key: str) -> bool:
        """Count a use of a chunk; returns whether it is time for `flush_uses`, which the caller does elsewhere."""
        with self._lock:
            self._uses.append(key)
            return len(self._uses) % _USES_PER_FLUSH == 0

    def flush_uses(self) -> None:
        """Write the counted uses to the catalog."""
        with self._lock:
            uses, self._uses = self._uses, []
        if uses:
            with self._catalog.transaction() as run:
                self._ranking.record_uses(run, uses)

    def has_room(self, waiting: int = 0) -> bool:
        """Whether one more blob, and `waiting` others, all like the one written last, fit without evicting anything."""
        if self._max_bytes is None:
            return True
        return self._catalog.nbytes() + self.typical * (1 + waiting) <= self._max_bytes

    def write(self, row: CatalogRow, entry: TextEntry | None, data: bytes, *, is_used: bool) -> bool:
        """Write a blob if there is room, or can be made; returns whether. Either way the catalog knows the chunk.

        Args:
            row: The chunk; its `nbytes` is not looked at.
            entry: How its text is recognised.
            data: The blob.
            is_used: Whether a prompt has it now; otherwise it is only stored ahead of use.
        """
        is_kept = self._write(row, entry, data, is_used=is_used)
        if self.on_write is not None:
            self.on_write(row, data, is_kept)
        return is_kept

    def _write(self, row: CatalogRow, entry: TextEntry | None, data: bytes, *, is_used: bool) -> bool:
        self.typical = len(data)
        limited: AbstractContextManager[None] = nullcontext()
        if self._max_bytes is not None:
            limited = self._space_lock.exclusive()
        with limited:  # until the catalog counts the blob, nobody else may think that there is room
            if self._max_bytes is not None and not self._make_room(row, entry, len(data), self._max_bytes):
                return False
            mark = self._files.mark(row.key)
            try:
                self._files.write(row.key, data)
                try:
                    self.note_written(row, entry, len(data), is_used=is_used)
                except StoreError:  # a blob that the catalog does not count would not be within the limit
                    self._files.remove([row.key])
                    raise
            finally:
                mark.unlink(missing_ok=True)
        return True

    def note_written(self, row: CatalogRow, entry: TextEntry | None, nbytes: int, *, is_used: bool) -> None:
        """Enter a blob that is on disk into the catalog."""
        with self._catalog.transaction() as run:
            self._catalog.upsert(replace(row, nbytes=nbytes), entry)
            self._ranking.put_in(run, row.key, is_used=is_used)

    def _make_room(self, row: CatalogRow, entry: TextEntry | None, nbytes: int, max_bytes: int) -> bool:
        with self._catalog.transaction():
            self._catalog.upsert(replace(row, nbytes=0), entry)
            if not self._files.path(row.key).exists():  # a blob that somebody has removed takes no room
                self._catalog.mark_lost([row.key])
        if nbytes > max_bytes:
            return False
        self.flush_uses()
        needed = self._catalog.nbytes() + nbytes - max_bytes
        if needed <= 0:
            return True
        with self._catalog.transaction(is_write=False) as run:
            rank = self._ranking.rank_of(run, row.key, nbytes=nbytes)
        return self._evict(needed, rank=rank, spared=self._leases.held() | {row.key})

    def _evict(self, needed: int, *, rank: float, spared: set[str]) -> bool:
        with self._catalog.transaction() as run:
            victims = self._ranking.victims(run, needed=needed, rank=rank, spared=spared)
            if victims is None:
                return False
            self._files.remove(victims)
            self._catalog.mark_lost(victims)
        self._counters.add(evictions=len(victims))
        return True
