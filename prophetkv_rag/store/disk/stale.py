"""Dropping blobs that bear the trace of a chunk that was deleted since, wherever it was deleted."""

from __future__ import annotations

from collections.abc import Sequence

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store import DirectoryLock
from prophetkv_rag.store.blobs import BlobFiles
from prophetkv_rag.store.catalog import Catalog


def drop_stale(keys: Sequence[str], files: BlobFiles, catalog: Catalog, lock: DirectoryLock) -> list[str]:
    """Drop those of these blobs that bear such a trace; others may have been written in their place since.

    Returns:
        Their keys.
    """
    with lock.exclusive(), catalog.transaction():
        stale = [key for key in keys if _is_stale(key, files, catalog)]
        files.remove(stale)
        catalog.drop_traced(stale)
    return stale


def _is_stale(key: str, files: BlobFiles, catalog: Catalog) -> bool:
    try:
        traces = set(files.read_header(key).behind.traces)
    except (BlobError, OSError):
        return False
    return bool(traces) and len(catalog.known(list(traces))) < len(traces)
