"""Storing a chunk cache as a blob, where it is worth its place, and holding it in RAM."""

from __future__ import annotations

import logging
from collections.abc import Callable

from prophetkv_rag.store import ChunkCache, DirectoryLock, TextEntry
from prophetkv_rag.store.blobs import BlobFiles, BlobFormat, decode_blob, encode_blob
from prophetkv_rag.store.catalog import Catalog, CatalogRow, namespaces
from prophetkv_rag.store.disk.ram import RamTier
from prophetkv_rag.store.disk.space import Space

logger = logging.getLogger(__name__)


class BlobWriter:
    """Writes the blobs of a store.

    Args:
        files: Where they go.
        catalog: Asked whether somebody refers to a chunk, and what is known of it.
        space: Keeps the limits.
        lock: Held while one is written: nothing is deleted meanwhile.
        ram: Holds what was written.
        blob_format: How blobs are written.
        settle: Called with a key before it is written: what was found bad under it must be gone.
    """

    def __init__(
        self,
        files: BlobFiles,
        catalog: Catalog,
        space: Space,
        lock: DirectoryLock,
        ram: RamTier,
        *,
        blob_format: BlobFormat,
        settle: Callable[[str], None],
    ) -> None:
        self._files = files
        self._catalog = catalog
        self._space = space
        self._lock = lock
        self._ram = ram
        self._blob_format = blob_format
        self._settle = settle

    def write(
        self, key: str, cache: ChunkCache, *, fingerprint: str, entry: TextEntry | None, if_referenced: bool
    ) -> None:
        """Write a cache, or find that it is there, or that there is no room for it; see `ChunkStore.put`.

        Raises:
            StoreError, OSError: If it cannot be written.
        """
        self._settle(key)
        with self._lock.shared():
            if if_referenced and not self._catalog.has_references(key):
                return
            traces = cache.behind.traces
            if traces and len(self._catalog.known(traces)) < len(set(traces)):
                logger.debug("the chunk cache %s is not kept: it was encoded behind a chunk deleted since", key)
                return
            row, path = CatalogRow(key, fingerprint, cache.num_tokens, 0, cache.behind), self._files.path(key)
            is_there = path.exists()
            is_other = is_there and self._catalog.behind(key).keys != cache.behind.keys
            if is_other:
                self._catalog.replaced(key)
            elif is_there:
                self._space.note_written(row, entry, path.stat().st_size, is_used=if_referenced)
                if self._blob_format == "exact":  # else what is there may differ from what was computed
                    self._ram.put(key, cache, fingerprint=fingerprint)
                return
            plain = encode_blob(
                cache,
                key=key,
                fingerprint=fingerprint,
                blob_format=self._blob_format,
                entry=entry or self._catalog.entry_of(key),
                namespace=namespaces.namespace_of(self._catalog, fingerprint),
            )
            is_kept = self._space.write(row, entry, self._files.seal(key, plain), is_used=if_referenced)
            if is_kept and self._blob_format != "exact" and self._ram.max_bytes:
                cache = decode_blob(  # what the disk will give later
                    plain, key=key, fingerprint=fingerprint, packed=self._files.keeps_packed
                )
            self._ram.put(key, cache, fingerprint=fingerprint)
