"""Loading a chunk cache from its blob, and dropping a blob that is not what it should be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from prophetkv_rag.chunk_cache import ChunkCache
from prophetkv_rag.errors import BlobError, StoreError
from prophetkv_rag.store.blob_files import BlobFiles
from prophetkv_rag.store.catalog import Catalog
from prophetkv_rag.store.disk_parts import Counters
from prophetkv_rag.store.files import DirectoryLock
from prophetkv_rag.store.formats import BlobFormat
from prophetkv_rag.store.sealing import LockedBlobError

logger = logging.getLogger(__name__)


class BlobReader:
    """Reads the blobs of a store.

    Args:
        files: Where they are.
        catalog: Told about blobs that are dropped.
        lock: Held while one is dropped; `None` to drop none (a store that is opened read-only).
        counters: Told about misses and bad blobs.
        forget: Called with the keys that are dropped.
        blob_format: Blobs of another lossy format are dropped, and count as misses.
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
    ) -> None:
        self._files = files
        self._catalog = catalog
        self._lock = lock
        self._counters = counters
        self._forget = forget
        self._blob_format = blob_format

    def read(self, key: str, *, fingerprint: str, input_ids: Sequence[int]) -> tuple[ChunkCache | None, bool]:
        """Return the verified cache, or `None`, and whether there was a blob that cannot be used."""
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
            found = self._drop_if_bad(key, fingerprint=fingerprint, input_ids=input_ids)
            if found is None:
                self._report_corrupt(key, error)
            return found, found is None
        except OSError as error:  # not readable now, which says nothing about the blob
            self._report_corrupt(key, error)
            return None, True
        if header.blob_format in ("exact", self._blob_format):
            return cache, False
        logger.debug("the chunk cache %s is of format %s: computed again", key, header.blob_format)
        self._counters.add(misses=1)
        if self._lock is not None:
            self._drop(key)
        return None, False

    def _drop_if_bad(self, key: str, *, fingerprint: str, input_ids: Sequence[int]) -> ChunkCache | None:
        """Delete a blob that was found bad, unless somebody has replaced it since: then return what it holds now."""
        if self._lock is None:
            return None
        try:
            with self._lock.exclusive():
                try:
                    return self._files.read(key, fingerprint=fingerprint, input_ids=input_ids)[1]
                except FileNotFoundError:
                    return None
                except BlobError:
                    self._drop(key)
        except OSError:
            logger.debug("could not look at the chunk cache %s again", key, exc_info=True)
        return None

    def _drop(self, key: str) -> None:
        try:
            self._forget([key])
            self._files.remove([key])
            self._catalog.mark_lost([key])
        except (OSError, StoreError):
            logger.debug("could not remove the chunk cache %s", key, exc_info=True)

    def _report_corrupt(self, key: str, reason: Exception) -> None:
        if self._counters.add_corrupt(key):
            path = self._files.path(key)
            logger.warning("the chunk cache %s cannot be used and is computed again: %s", path, reason)
