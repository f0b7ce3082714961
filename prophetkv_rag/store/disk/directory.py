"""A store's directory: made where it is missing, its catalog opened, or made again from the blobs."""

from __future__ import annotations

import logging
from pathlib import Path

from prophetkv_rag.errors import StoreError
from prophetkv_rag.store import DirectoryLock, make_private_directory
from prophetkv_rag.store.blobs import BlobFiles
from prophetkv_rag.store.catalog import Catalog, CorruptCatalogError, set_aside
from prophetkv_rag.store.disk.key_mark import claim
from prophetkv_rag.store.disk.rebuild import rebuild, sweep

logger = logging.getLogger(__name__)


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
