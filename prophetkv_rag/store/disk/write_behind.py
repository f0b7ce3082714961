"""Parts of the disk store that stand alone: settings, counters, opening the catalog, writing in the background."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.store import ChunkCache, DirectoryLock, Failures, Policy, make_private_directory
from prophetkv_rag.store.blobs import BlobFiles
from prophetkv_rag.store.catalog import Catalog, CorruptCatalogError, Eviction, set_aside
from prophetkv_rag.store.disk.key_mark import claim
from prophetkv_rag.store.disk.rebuild import rebuild, sweep

logger = logging.getLogger(__name__)

MAX_LOGGED = 20
"""Bad blobs that are named in the log; a disk that dies has thousands."""

MAX_WAITING_BYTES = 256 << 20
"""Computed caches that may wait for the disk while queries go on; what comes when they are more is not stored."""


def check_settings(policy: str, eviction: str, max_bytes: int | None, **limits: int | None) -> None:
    """Raise `InputError` for a setting that is not allowed."""
    for name, value, allowed in (("policy", policy, get_args(Policy)), ("eviction", eviction, get_args(Eviction))):
        if value not in allowed:
            msg = f"{name} is {value!r}; allowed: {', '.join(allowed)}"
            raise InputError(msg)
    for name, limit in {"max_bytes": max_bytes, **limits}.items():
        if limit is not None and limit < 0:
            msg = f"{name} is {limit}; give 0 or more bytes, or None for no limit"
            raise InputError(msg)


def open_catalog(directory: Path, files: BlobFiles, lock: DirectoryLock, *, read_only: bool) -> Catalog:
    """Make what is missing of a directory and open its catalog; one that is damaged is made again from the blobs.

    Raises:
        StoreError: If the directory cannot be used.
    """
    try:
        if not read_only:
            for part in (directory, directory / "leases"):
                make_private_directory(part)
            files.make_directories()
        return _open_catalog(directory, files, lock, read_only=read_only)
    except OSError as error:
        msg = (
            f"cannot use {directory} for chunk caches: {error}; give a directory that can be written to, or open it "
            "with policy='read_only'"
        )
        raise StoreError(msg) from error


def _open_catalog(directory: Path, files: BlobFiles, lock: DirectoryLock, *, read_only: bool) -> Catalog:
    path = directory / "catalog.sqlite"
    claim(directory, files, lock, read_only=read_only)
    if read_only:
        if not path.exists():
            msg = f"there are no chunk caches at {directory}, so it cannot be opened with policy='read_only'"
            raise StoreError(msg)
        return Catalog(path, read_only=True)
    with lock.exclusive():  # two processes must not both make the tables; nobody is writing now
        try:
            catalog = Catalog(path)
        except CorruptCatalogError as error:
            logger.warning("%s; it is set aside and made again from the chunk caches", error)
            set_aside(path)
            catalog = Catalog(path)
        if catalog.is_new:
            rebuild(catalog, files)
        sweep(catalog, files)
    return catalog


def deletes(catalog: Catalog) -> int:
    """Return how many chunks any process has ever deleted; 0 if that cannot be read, as in an older catalog."""
    try:
        with catalog.transaction(is_write=False) as run:
            found = run.execute("SELECT value FROM state WHERE name = 'deletes'").fetchone()
    except StoreError:
        return 0
    return int(found[0]) if found else 0


class Counters:
    """Counts since the store was opened. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._save_lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._saved: Counter[str] = Counter()
        self._logged: set[str] = set()

    def add(self, **counts: int) -> None:
        """Count; by the names of `StoreStats`."""
        with self._lock:
            self._counts.update(counts)

    def add_corrupt(self, key: str) -> bool:
        """Count a bad blob; returns whether it is to be logged: each key once, and not without end."""
        with self._lock:
            self._counts["corrupt"] += 1
            if key in self._logged or len(self._logged) > MAX_LOGGED:
                return False
            self._logged.add(key)
            is_last = len(self._logged) > MAX_LOGGED
        if is_last:
            logger.warning(
                "more chunk caches cannot be used: from now on they are counted (`cache verify`), not logged"
            )
        return not is_last

    def values(self) -> dict[str, int]:
        """Return what has been counted."""
        with self._lock:
            return dict(self._counts)

    def save(self, write: Callable[[dict[str, int]], None], **counts: int) -> None:
        """Call `write` with what has been counted since the last time, and with other `counts` kept elsewhere."""
        with self._save_lock:  # not the other one: no query waits for what `write` may wait for
            with self._lock:
                now = self._counts | Counter(counts)
            write({name: count - self._saved[name] for name, count in now.items() if count != self._saved[name]})
            self._saved = now


class Later:
    """Writes caches in a thread of its own, so that no query waits for the disk. What waits can be read already.

    What could not be written is computed again when it is next needed.
    """

    def __init__(self, put: Callable[[str, ChunkCache, str], None], failures: Failures) -> None:
        """`put` is called in the thread with key, cache and fingerprint; `failures` is told what fails."""
        self._put = put
        self._failures = failures
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[str, ChunkCache]] = {}
        self._nbytes = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prophetkv-disk")
        self._futures: set[Future[None]] = set()

    def add(self, key: str, cache: ChunkCache, fingerprint: str) -> None:
        """Take a cache to write, unless too much is waiting already."""
        with self._lock:
            if key in self._waiting or self._nbytes + cache.nbytes > MAX_WAITING_BYTES:
                return
            self._waiting[key] = (fingerprint, cache)
            self._nbytes += cache.nbytes
        self.run(self._write, key)

    def get(self, key: str, *, fingerprint: str, input_ids: Sequence[int]) -> ChunkCache | None:
        """Return a cache that waits, if it is the one that is meant."""
        with self._lock:
            found = self._waiting.get(key)
        return found[1] if found and found[0] == fingerprint and found[1].has_ids(input_ids) else None

    def drop(self, keys: Iterable[str]) -> None:
        """Do not write these."""
        with self._lock:
            for key in keys:
                found = self._waiting.pop(key, None)
                self._nbytes -= found[1].nbytes if found else 0

    def run(self, action: Callable[..., None], *arguments: Any) -> None:
        """Call something in the thread; a closed store does nothing."""
        try:
            future = self._worker.submit(self._guarded, action, *arguments)
        except RuntimeError:
            return
        with self._lock:
            self._futures.add(future)
        future.add_done_callback(self._done)

    def wait(self) -> None:
        """Wait until all that was added has been written or has failed."""
        while True:
            with self._lock:
                futures = list(self._futures)
            if not futures:
                return
            for future in futures:
                future.result()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._worker.shutdown(wait=True)

    def _done(self, future: Future[None]) -> None:
        with self._lock:
            self._futures.discard(future)

    def _write(self, key: str) -> None:
        with self._lock:
            found = self._waiting.get(key)
        if found is None:
            return
        try:
            self._put(key, found[1], found[0])
        except (StoreError, OSError) as error:
            self._failures.note(error, caches=1)
        finally:
            self.drop([key])

    def _guarded(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except (StoreError, OSError) as error:
            self._failures.note(error)
        except Exception:
            logger.exception("storing chunk caches failed")
