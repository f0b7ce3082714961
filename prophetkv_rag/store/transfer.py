"""Moving chunk caches to another machine: a tar file of blobs, each of which is checked before it is taken in."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from prophetkv_rag.errors import BlobError, InputError
from prophetkv_rag.store.blob import decode_blob, parse_blob_header
from prophetkv_rag.store.catalog import UNKNOWN_OWNER, CatalogRow
from prophetkv_rag.store.keys import is_key

if TYPE_CHECKING:
    from prophetkv_rag.store.disk import DiskStore

_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class ImportReport:
    """Caches taken in, those that were there, those there was no room for, and the names of what was refused."""

    added: int = 0
    known: int = 0
    no_room: int = 0
    refused: tuple[str, ...] = ()


def export_caches(store: DiskStore, path: Path, progress: Callable[[int], None] | None = None) -> int:
    """Write all caches of a store to a tar file; returns how many. It is there completely or not at all.

    Raises:
        InputError: If the file cannot be written, or is there already.
    """
    if path.exists():
        msg = f"{path} is there already; give another name, or delete it"
        raise InputError(msg)
    temporary, count = path.with_name(f"{path.name}.part"), 0
    try:
        with tarfile.open(temporary, "w") as archive:
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
        temporary.chmod(0o600)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        msg = f"cannot write {path}: {error}"
        raise InputError(msg) from error
    return count


def import_caches(store: DiskStore, path: Path) -> ImportReport:
    """Take in the caches of a tar file that `export_caches` wrote.

    Until a collection refers to them (indexing the same texts does, and so does `cache warm`) whoever drops one first
    deletes it.

    Raises:
        InputError: If the file cannot be read as a tar file.
    """
    added = known = no_room = 0
    refused = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key = member.name.removesuffix(_SUFFIX)
                file = archive.extractfile(member) if member.isfile() and is_key(key) else None
                data = b"" if file is None else file.read()
                try:
                    header = parse_blob_header(data)
                    fingerprint = str(header.metadata.get("fingerprint"))
                    decode_blob(data, key=key, fingerprint=fingerprint)
                except BlobError:
                    refused.append(member.name[:100])
                    continue
                if key in store:
                    known += 1
                    continue
                row = CatalogRow(key, fingerprint, header.num_tokens, 0)
                with store.directory_lock.shared():
                    is_kept = store.space.write(row, header.entry, data, is_used=False)
                    store.catalog.add_references(UNKNOWN_OWNER, [key])
                added += is_kept
                no_room += not is_kept
    except (OSError, tarfile.TarError) as error:
        msg = f"cannot read {path} as an export of chunk caches: {error}"
        raise InputError(msg) from error
    return ImportReport(added, known, no_room, tuple(refused))
