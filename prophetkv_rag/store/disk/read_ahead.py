"""Reads blobs into the RAM tier before a prompt needs them: from the moment that a collection finds the chunks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store import ChunkCache
from prophetkv_rag.store.blobs import BlobFiles, BlobFormat
from prophetkv_rag.store.disk.ram import RamTier

logger = logging.getLogger(__name__)


class ReadAhead:
    """What it cannot read is left to the query itself, which says what is wrong; nothing is counted here.

    Args:
        files: The blobs.
        ram: Where they go.
        hold: Puts them there, called with key, cache and fingerprint.
        blob_format: Blobs of another lossy format are left alone.
    """

    def __init__(
        self,
        files: BlobFiles,
        ram: RamTier,
        hold: Callable[[str, ChunkCache, str], None],
        blob_format: BlobFormat,
    ) -> None:
        self._files = files
        self._ram = ram
        self._hold = hold
        self._blob_format = blob_format

    def __call__(self, keys: Iterable[str], fingerprint: str) -> None:
        """Read what the RAM tier lacks, in order, as far as all of it fits in there, beside what it has of them."""
        keys = list(dict.fromkeys(keys))
        room = self._ram.namespace_max_bytes - sum(self._ram.use(key) or 0 for key in keys)
        for key in keys:
            if self._ram.holds(key):
                continue
            try:
                header, cache = self._files.read(key, fingerprint=fingerprint)
            except (BlobError, OSError) as error:
                logger.debug("the chunk cache %s was not read ahead: %s", key, error)
                continue
            room -= cache.nbytes
            if room < 0:
                return
            if header.blob_format in ("exact", self._blob_format):
                self._hold(key, cache, fingerprint)
