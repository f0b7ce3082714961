"""Making a catalog again from the blobs, and sweeping up what a killed process left."""

from __future__ import annotations

import logging

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store.blobs import BlobFiles
from prophetkv_rag.store.catalog import UNKNOWN_OWNER, Catalog, CatalogRow, namespaces

logger = logging.getLogger(__name__)


def rebuild(catalog: Catalog, files: BlobFiles) -> int:
    """Enter every blob into the catalog, by what its header says; returns how many.

    A blob says how its chunk's text is recognised, but not who refers to the chunk: the first owner to drop it deletes
    it. Blobs that cannot be read stay, as orphans. The caller holds the directory's lock alone.
    """
    found, namespace_of = [], dict[str, str | None]()
    for path in files.all_files():
        key = files.key_of(path)
        if key is None:
            continue
        try:
            header = files.read_header(key)
            if header.metadata.get("key") != key:
                continue
            fingerprint, nbytes = str(header.metadata["fingerprint"]), path.stat().st_size
            row = CatalogRow(key, fingerprint, header.num_tokens, nbytes, header.behind)
        except (BlobError, OSError, KeyError):
            continue
        found.append((row, header.entry))
        namespace_of[row.fingerprint] = header.namespace
    if found:
        with catalog.transaction():
            for row, entry in found:
                catalog.upsert(row, entry)
            for fingerprint, namespace in namespace_of.items():
                namespaces.learn(catalog, fingerprint, namespace)
            catalog.add_references(UNKNOWN_OWNER, [row.key for row, _ in found])
        logger.warning("the catalog of %d chunk caches was made again from their files", len(found))
    return len(found)


def sweep(catalog: Catalog, files: BlobFiles) -> int:
    """Remove what was being written when a process was killed; nobody may be writing now. Returns how many files."""
    paths, keys = files.left_over()
    # A blob may have got its name and no row, or a row that does not count its bytes: the limit would not know of it.
    files.remove([key for key in keys if not catalog.nbytes_of(key)])
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)
