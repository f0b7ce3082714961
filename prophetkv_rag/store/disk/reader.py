"""Loading a chunk cache from its blob, and dropping a blob that is not what it should be.

Dropping takes the directory's lock alone, which others may hold for long, so a query only notes what it found bad and
goes on; a thread of the store's drops it, before anything else that the query gives it to do.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from prophetkv_rag.errors import BlobError, StoreError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.store import ChunkCache, DirectoryLock
from prophetkv_rag.store.blobs import BlobFiles, BlobFormat
from prophetkv_rag.store.catalog import Catalog
from prophetkv_rag.store.disk.counters import Counters
from prophetkv_rag.store.encryption import LockedBlobError

logger = logging.getLogger(__name__)


class BlobReader:
    """Reads the blobs of a store.

    Args:
        files: Where they are.
        catalog: Told about blobs that are dropped.
        lock: Held while one is dropped; `None` to drop none (a store that is opened read-only).
        counters: Told about misses and bad blobs.
        forget: Called with the key of what is bad: what RAM has of it is not what was asked for either.
        blob_format: Blobs of another lossy format are dropped, and count as misses.
        later: Runs a function with arguments in another thread, in the order it is given them.
    """

    def __init__(
        self,
        files: BlobFiles,
        catalog: Catalog,
        lock: DirectoryLock | None,
        counters: Counters,
        forget: Callable[[Iterable[str]], None],
        *,
        blob_format: BlobFormat,
        later: Callable[..., object],
    ) -> None:
        self._files = files
        self._catalog = catalog
        self._lock = lock
        self._counters = counters
        self._forget = forget
        self._blob_format = blob_format
        self._later = later
        self._bad_lock = threading.Lock()
        self._bad: dict[str, tuple[str, Sequence[int] | None, str | None]] = {}
        around_fork(self, "_bad_lock", in_child=BlobReader._forget_bad)

    def is_bad(self, key: str) -> bool:
        """Whether the blob of `key` was found bad, and is still to be dropped."""
        with self._bad_lock:
            return key in self._bad

    def read(self, key: str, *, fingerprint: str, input_ids: Sequence[int] | None) -> tuple[ChunkCache | None, bool]:
        """Return the verified cache, or `None`, and whether there was a blob that cannot be used."""
        if self.is_bad(key):  # that was said already
            self._counters.add(misses=1)
            return None, False
        try:
            header, cache = self._files.read(key, fingerprint=fingerprint, input_ids=input_ids)
        except FileNotFoundError:
            self._counters.add(misses=1)
            return None, False
        except LockedBlobError as error:  # it may be good: somebody else has the key
            logger.debug("the chunk cache %s is computed again: %s", key, error)
            self._counters.add(misses=1)
            return None, False
        except BlobError as error:
            found = self._look_again(key, fingerprint=fingerprint, input_ids=input_ids)
            if found is None:
                self._note_bad(key, fingerprint, input_ids)
                self._report_corrupt(key, error)
            return found, found is None
        except OSError as error:  # not readable now, which says nothing about the blob
            self._report_corrupt(key, error)
            return None, True
        if header.blob_format in ("exact", self._blob_format):
            return cache, False
        logger.debug("the chunk cache %s is of format %s: computed again", key, header.blob_format)
        self._counters.add(misses=1)
        self._note_bad(key, fingerprint, input_ids)
        return None, False

    def reject(self, key: str, *, fingerprint: str, input_ids: Sequence[int], dtype: str) -> None:
        """Drop a blob that was read and whose numbers are not of this dtype."""
        self._note_bad(key, fingerprint, input_ids, dtype)
        self._report_corrupt(key, BlobError(f"its numbers are not of {dtype}"))

    def settle(self, key: str) -> None:
        """Drop the blob of `key` if it was found bad, unless somebody has replaced it since. Waits for the lock."""
        with self._bad_lock:
            found = self._bad.get(key)
        if found is None or self._lock is None:
            return
        try:
            with self._lock.exclusive():
                if not self._is_good(key, *found):
                    self._files.remove([key])
                    self._catalog.mark_lost([key])
        except (OSError, StoreError):
            logger.debug("could not remove the chunk cache %s", key, exc_info=True)
        finally:
            with self._bad_lock:
                self._bad.pop(key, None)

    def _forget_bad(self) -> None:
        self._bad.clear()  # the parent's thread drops them

    def _note_bad(self, key: str, fingerprint: str, input_ids: Sequence[int] | None, dtype: str | None = None) -> None:
        if self._lock is not None:
            self._forget([key])
            with self._bad_lock:
                self._bad[key] = fingerprint, input_ids, dtype
            self._later(self.settle, key)

    def _is_good(self, key: str, fingerprint: str, input_ids: Sequence[int] | None, dtype: str | None) -> bool:
        """Whether what is there now may stay; also where nothing is."""
        try:
            header, cache = self._files.read(key, fingerprint=fingerprint, input_ids=input_ids)
        except (FileNotFoundError, LockedBlobError):
            return True
        except BlobError:
            return False
        return header.blob_format in ("exact", self._blob_format) and (dtype is None or cache.is_of(dtype))

    def _look_again(self, key: str, *, fingerprint: str, input_ids: Sequence[int] | None) -> ChunkCache | None:
        """Read a blob once more: somebody may just have replaced a bad one."""
        try:
            header, cache = self._files.read(key, fingerprint=fingerprint, input_ids=input_ids)
        except (BlobError, OSError):
            return None
        return cache if header.blob_format in ("exact", self._blob_format) else None

    def _report_corrupt(self, key: str, reason: Exception) -> None:
        if self._counters.add_corrupt(key):
            path = self._files.path(key)
            logger.warning("the chunk cache %s cannot be used and is computed again: %s", path, reason)
