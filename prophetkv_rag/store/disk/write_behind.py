"""Writing caches behind the queries' back: a thread that takes them, so that nobody waits for the disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from prophetkv_rag.errors import StoreError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.store import ChunkCache, Failures

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 256 << 20
"""Computed caches that may wait for the disk while queries go on; what comes when they are more is not stored."""


class WriteBehind:
    """Writes caches in a thread of its own, so that no query waits for the disk. What waits can be read already.

    What could not be written is computed again when it is next needed.
    """

    def __init__(self, put: Callable[[str, ChunkCache, str], None], failures: Failures) -> None:
        """`put` is called in the thread with key, cache and fingerprint; `failures` is told what fails."""
        self._put = put
        self._failures = failures
        self._lock = threading.Lock()
        self._is_closed = False
        self._begin_anew()
        around_fork(self, "_lock", in_child=WriteBehind._begin_anew)

    def _begin_anew(self) -> None:
        """Begin with nothing waiting: in a child, the parent writes what waited, and its thread is not here."""
        self._waiting: dict[str, tuple[str, ChunkCache]] = {}
        self._nbytes = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prophetkv-disk")
        self._futures: set[Future[None]] = set()
        if self._is_closed:
            self._worker.shutdown()

    def add(self, key: str, cache: ChunkCache, fingerprint: str) -> None:
        """Take a cache to write, unless too much is waiting already."""
        with self._lock:
            if key in self._waiting or self._nbytes + cache.nbytes > MAX_WAITING_BYTES:
                return
            self._waiting[key] = (fingerprint, cache)
            self._nbytes += cache.nbytes
        self.run(self._write, key)

    def get(self, key: str, *, fingerprint: str, input_ids: Sequence[int] | None) -> ChunkCache | None:
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

    def run(self, action: Callable[..., None], *arguments: Any) -> Future[None] | None:
        """Call something in the thread; returns what is done then. A closed store does nothing."""
        try:
            future = self._worker.submit(self._guarded, action, *arguments)
        except RuntimeError:
            return None
        with self._lock:
            self._futures.add(future)
        future.add_done_callback(self._done)
        return future

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
        self._is_closed = True
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
