"""The byte limits of the disk tier: room is made before a blob is written, by evicting what is worth less.

A namespace that has a limit of its own makes room among its own blobs first. Only where the whole disk's limit is less
than what all namespaces may have together is a namespace's blob ever evicted for another's.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from prophetkv_rag.errors import StoreError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.store import DirectoryLock, TextEntry
from prophetkv_rag.store.blobs import BlobFiles
from prophetkv_rag.store.catalog import Catalog, CatalogRow, Ranking, namespaces
from prophetkv_rag.store.disk.counters import Counters
from prophetkv_rag.store.disk.leases import Leases

_USES_PER_FLUSH = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Most bytes of blobs on disk, all together and of each namespace; `None` for no limit."""

    all_bytes: int | None = None
    namespace_bytes: int | None = None

    def __bool__(self) -> bool:
        return self.all_bytes is not None or self.namespace_bytes is not None


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
        limits: Limits,
        directory: Path,
        counters: Counters,
    ) -> None:
        self._catalog = catalog
        self._files = files
        self._leases = leases
        self._ranking = ranking
        self._limits = limits
        self._space_lock = DirectoryLock(directory / "space.lock")
        self._counters = counters
        self._lock = threading.Lock()
        self._uses: list[str] = []
        around_fork(self, "_lock", in_child=Space._forget_uses)
        self.typical = 0
        """Size in bytes of the blob written last."""
        self.on_write: Callable[[CatalogRow, bytes, bool], None] | None = None
        """Told about every blob that was to be written, and whether it was; called while no space lock is held."""
        self.on_failure: Callable[[CatalogRow, TextEntry | None, bytes, Exception], bool] | None = None
        """Told about a blob that could not be written; says whether it is kept elsewhere, or the error is raised."""

    def _forget_uses(self) -> None:
        self._uses = []  # the parent notes them

    def adopt(self) -> None:
        """Rank the catalog by this store's rule, and evict what is above its limits (which may be new ones)."""
        with self._catalog.transaction() as run:
            self._ranking.adopt(run)
        if not self._limits:
            return
        with self._space_lock.exclusive():
            leased = self._leases.held()
            with self._catalog.transaction() as run:
                doomed: list[str] = []
                each = self._limits.namespace_bytes
                for fingerprints, needed in [] if each is None else namespaces.above(run, each):
                    doomed += (
                        self._ranking.victims(run, needed=needed, rank=math.inf, spared=leased, among=fingerprints)
                        or ()
                    )
                self._drop(doomed)
                if self._limits.all_bytes is not None:
                    needed = self._catalog.nbytes() - self._limits.all_bytes
                    self._drop(self._ranking.victims(run, needed=needed, rank=math.inf, spared=leased) or ())

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

    def has_room(self, waiting: int = 0, *, fingerprint: str | None = None) -> bool:
        """Whether one more blob, and `waiting` others, all like the one written last, fit without evicting anything."""
        coming, limits = self.typical * (1 + waiting), self._limits
        if limits.all_bytes is not None and self._catalog.nbytes() + coming > limits.all_bytes:
            return False
        if limits.namespace_bytes is None or fingerprint is None:
            return True
        with self._catalog.transaction(is_write=False) as run:
            return (
                namespaces.bytes_of(run, namespaces.fingerprints_with(run, fingerprint)) + coming
                <= limits.namespace_bytes
            )

    def write(self, row: CatalogRow, entry: TextEntry | None, data: bytes, *, is_used: bool) -> bool:
        """Write a blob if there is room, or can be made; returns whether. Either way the catalog knows the chunk.

        Args:
            row: The chunk; its `nbytes` is not looked at.
            entry: How its text is recognised.
            data: The blob.
            is_used: Whether a prompt has it now; otherwise it is only stored ahead of use.

        Raises:
            StoreError, OSError: If it cannot be written, and is not kept elsewhere (`on_failure`).
        """
        try:
            is_kept = self._write(row, entry, data, is_used=is_used)
        except (OSError, StoreError) as error:
            if self.on_failure is None or not self.on_failure(row, entry, data, error):
                raise
            return False
        if self.on_write is not None:
            self.on_write(row, data, is_kept)
        return is_kept

    def _write(self, row: CatalogRow, entry: TextEntry | None, data: bytes, *, is_used: bool) -> bool:
        self.typical = len(data)
        limited: AbstractContextManager[None] = nullcontext()
        if self._limits:
            limited = self._space_lock.exclusive()
        with limited:  # until the catalog counts the blob, nobody else may think that there is room
            if self._limits and not self._make_room(row, entry, len(data)):
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

    def _make_room(self, row: CatalogRow, entry: TextEntry | None, nbytes: int) -> bool:
        with self._catalog.transaction():
            self._catalog.upsert(replace(row, nbytes=0, behind=None), entry)
            if not self._files.path(row.key).exists():  # a blob that somebody has removed takes no room
                self._catalog.mark_lost([row.key])
        limits = self._limits
        if any(limit is not None and nbytes > limit for limit in (limits.all_bytes, limits.namespace_bytes)):
            return False
        with self._catalog.transaction(is_write=False) as run:
            own = namespaces.fingerprints_with(run, row.fingerprint)
            own_needed = (
                0 if limits.namespace_bytes is None else namespaces.bytes_of(run, own) + nbytes - limits.namespace_bytes
            )
        needed = 0 if limits.all_bytes is None else self._catalog.nbytes() + nbytes - limits.all_bytes
        if own_needed <= 0 and needed <= 0:
            return True
        self.flush_uses()
        return self._evict(row.key, nbytes, needed=needed, own=own, own_needed=own_needed)

    def _evict(self, key: str, nbytes: int, *, needed: int, own: list[str], own_needed: int) -> bool:
        """Evict for a chunk what ranks lower: of its own namespace what that lacks, and of all the rest; or nothing."""
        spared = self._leases.held() | {key}
        with self._catalog.transaction() as run:
            rank = self._ranking.rank_of(run, key, nbytes=nbytes)
            victims = self._ranking.victims(run, needed=own_needed, rank=rank, spared=spared, among=own)
            if victims is None:
                return False
            freed = sum(self._catalog.nbytes_of(victim) for victim in victims)
            others = self._ranking.victims(run, needed=needed - freed, rank=rank, spared=spared.union(victims))
            if others is None:
                return False
            self._drop([*victims, *others])
        return True

    def _drop(self, victims: Iterable[str]) -> None:
        """Evict these, inside a transaction."""
        victims = list(victims)
        self._files.remove(victims)
        self._catalog.mark_lost(victims)
        self._counters.add(evictions=len(victims))
