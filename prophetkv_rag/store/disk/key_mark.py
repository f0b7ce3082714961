"""Which key a directory's caches are encrypted with, so that nothing is written in clear beside them by oversight."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.store import DirectoryLock, write_file
from prophetkv_rag.store.blobs import BlobFiles
from prophetkv_rag.store.encryption import EncryptionKey

logger = logging.getLogger(__name__)

_NAME = "encryption-key-id"


def claim(directory: Path, files: BlobFiles, lock: DirectoryLock, *, read_only: bool) -> None:
    """Note the key's id in a directory that has none yet, and lock `files` if the directory has another one.

    A locked store uses, writes and drops no blob: a key that was forgotten or mistaken must neither destroy caches nor
    put in clear what was to be encrypted.

    Raises:
        OSError: If the directory cannot be read or written to.
        StoreError: If the note is damaged, or there is no catalog and no key to make it again with.
    """
    path, given = directory / _NAME, files.encryption_key
    if given is not None and not read_only and not path.exists():
        with lock.exclusive():
            if not path.exists():
                if any(True for _ in files.all_files()):
                    logger.warning(
                        "the chunk caches at %s were stored before there was a key: they are in clear and not used; "
                        "delete them with: prophetkv-rag cache verify --repair",
                        directory,
                    )
                write_mark(directory, given)
    if not path.exists() or _read(path) == (given and given.id):
        return
    files.locked_by = locked_message(directory, _read(path), None if given is None else given.id)
    logger.warning("%s; until then they are left alone and every prompt computes its own", files.locked_by)
    if not (directory / "catalog.sqlite").exists():
        raise StoreError(files.locked_by)


def locked_message(directory: Path, key_id: str, given: str | None) -> str:
    """Say which key is wanted and what can be done."""
    return (
        f"the chunk caches at {directory} are encrypted with the key {key_id}, and "
        f"{'no key' if given is None else f'the key {given}'} was given; give that key (encryption_key=..., --key-file "
        "or PROPHETKV_CACHE_KEY), or delete the caches first: prophetkv-rag cache clear --all"
    )


def must_be_unlocked(files: BlobFiles) -> None:
    """Raise `InputError` if the caches are encrypted with a key that was not given."""
    if files.locked_by is not None:
        raise InputError(files.locked_by)


def write_mark(directory: Path, key: EncryptionKey | None) -> None:
    """Note which key the directory's caches are encrypted with from now on; `None` for none, or for any."""
    if key is None:
        (directory / _NAME).unlink(missing_ok=True)
    else:
        write_file(directory / _NAME, key.id.encode() + b"\n")


def _read(path: Path) -> str:
    text = path.read_text(encoding="ascii", errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{32}", text):
        msg = f"{path} should hold the id of an encryption key, and does not; `cache clear --all` starts anew"
        raise StoreError(msg)
    return text
