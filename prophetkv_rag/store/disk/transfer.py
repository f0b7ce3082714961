"""Moving chunk caches to another machine: a tar file of blobs, each of which is checked before it is taken in."""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from prophetkv_rag.errors import BlobError, InputError
from prophetkv_rag.store import is_key
from prophetkv_rag.store.blobs import decode_file
from prophetkv_rag.store.catalog import UNKNOWN_OWNER, CatalogRow, namespaces
from prophetkv_rag.store.disk.key_mark import must_be_unlocked
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.encryption import EncryptionKey, unseal

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class ImportReport:
    """Caches taken in, those that were there, those there was no room for, and the names of what was refused."""

    added: int = 0
    known: int = 0
    no_room: int = 0
    refused: tuple[str, ...] = ()


def export_caches(store: DiskStore, path: Path, progress: Callable[[int], None] | None = None) -> int:
    """Write all caches of a store to a tar file, as they are; returns how many. It is there completely or not at all.

    Raises:
        InputError: If the file cannot be written, or is there already.
    """
    if path.exists():
        msg = f"{path} is there already; give another name, or delete it"
        raise InputError(msg)
    temporary, count = path.with_name(f"{path.name}.part"), 0
    try:
        temporary.unlink(missing_ok=True)  # what an export that was killed left
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # private from the first byte on
        with open(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
            for row in store.catalog.rows():
                blob = store.files.path(row.key)
                if row.nbytes and blob.exists():
                    data = blob.read_bytes()
                    member = tarfile.TarInfo(blob.name)
                    member.size, member.mode = len(data), 0o600
                    archive.addfile(member, BytesIO(data))
                    count += 1
                if progress is not None:
                    progress(1)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        msg = f"cannot write {path}: {error}"
        raise InputError(msg) from error
    return count


def import_caches(
    store: DiskStore, path: Path, *, source_key: EncryptionKey | None = None, is_plain: bool = False
) -> ImportReport:
    """Take in the caches of a tar file that `export_caches` wrote.

    Until a collection refers to them (indexing the same texts does, and so does `cache warm`) whoever drops one first
    deletes it.

    Args:
        store: Where they go; encrypted, if it has a key.
        path: The tar file.
        source_key: What the file's caches are encrypted with; `None` for the store's own key.
        is_plain: Whether they are not encrypted though the store has a key. They prove nothing then: anybody can make
            such a file.

    Raises:
        InputError: If the file cannot be read as a tar file, or the store's own key is not the one it was given.
    """
    must_be_unlocked(store.files)
    expected = None if is_plain else source_key or store.files.encryption_key
    added = known = no_room = 0
    refused = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key = member.name.removesuffix(_SUFFIX)
                # A sparse member may claim any size; what `export_caches` writes is none, and no longer than the file.
                is_blob = member.isfile() and not member.issparse() and is_key(key)
                file = archive.extractfile(member) if is_blob else None
                data = b"" if file is None else file.read()
                try:
                    header, _ = decode_file(data, key=key, encryption_key=expected)
                except BlobError as error:
                    logger.debug("%s was refused: %s", member.name[:100], error)
                    refused.append(member.name[:100])
                    continue
                if key in store:
                    known += 1
                    continue
                if expected != store.files.encryption_key:
                    data = store.files.seal(key, data if expected is None else unseal(data, expected, key=key))
                row = CatalogRow(key, str(header.metadata["fingerprint"]), header.num_tokens, 0, header.behind)
                namespaces.learn(store.catalog, row.fingerprint, header.namespace)
                with store.directory_lock.shared():
                    is_kept = store.space.write(row, header.entry, data, is_used=False)
                    store.catalog.add_references(UNKNOWN_OWNER, [key])
                added += is_kept
                no_room += not is_kept
    except (OSError, tarfile.TarError) as error:
        msg = f"cannot read {path} as an export of chunk caches: {error}"
        raise InputError(msg) from error
    return ImportReport(added, known, no_room, tuple(refused))
