"""The blobs of a store on disk: one file a chunk, never more bytes than the limit, and what a crash leaves swept up.

    blobs/ab/<key>.safetensors      a blob
    incoming/<name>.tmp             a blob that is being written
    incoming/<key>.new              there while a blob is written that the catalog does not know yet

So what a killed process leaves is found without looking at all blobs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store import (
    TEMPORARY_SUFFIX,
    ChunkCache,
    check_key,
    is_key,
    make_private_directory,
    touch_private,
    write_file,
)
from prophetkv_rag.store.blobs.file import decode_file, read_blob, read_header, read_token_ids
from prophetkv_rag.store.blobs.header import BlobHeader
from prophetkv_rag.store.encryption import EncryptionKey, LockedBlobError, is_sealed, seal, unseal

_SUFFIX = ".safetensors"
_MARK = ".new"


class BlobFiles:
    """Names, writes and removes blobs; locks and the catalog are the store's business."""

    def __init__(self, directory: Path, encryption_key: EncryptionKey | None = None) -> None:
        self.directory = directory / "blobs"
        self.incoming = directory / "incoming"
        self.encryption_key = encryption_key
        self.locked_by: str | None = None
        """Why no blob here may be used, written or dropped (see `disk.key_mark`)."""
        self.keeps_packed = False
        """Whether `read` and `decode` leave packed what kernels can read so (see `blob.decode_body`)."""

    def make_directories(self) -> None:
        """Make the directories, where they are missing; `OSError` if they cannot be written to."""
        make_private_directory(self.directory)
        make_private_directory(self.incoming)

    def path(self, key: str) -> Path:
        """Return where the blob of `key` is, or would be."""
        return self.directory / check_key(key)[:2] / f"{key}{_SUFFIX}"

    def mark(self, key: str) -> Path:
        """Note that a blob is being written that the catalog does not know; the caller unlinks the mark afterwards."""
        path = self.incoming / f"{key}{_MARK}"
        touch_private(path)
        return path

    def read(
        self, key: str, *, fingerprint: str, input_ids: Sequence[int] | None = None
    ) -> tuple[BlobHeader, ChunkCache]:
        """Read and check the blob of `key`; see `read_blob`."""
        path = self._unlocked(key)
        return read_blob(
            path,
            key=key,
            fingerprint=fingerprint,
            input_ids=input_ids,
            encryption_key=self.encryption_key,
            packed=self.keeps_packed,
        )

    def read_token_ids(self, key: str, *, fingerprint: str) -> list[int]:
        """See `read_token_ids`."""
        return read_token_ids(self._unlocked(key), key=key, fingerprint=fingerprint, encryption_key=self.encryption_key)

    def read_header(self, key: str) -> BlobHeader:
        """Read the header of the blob of `key`; see `read_header`."""
        return read_header(self._unlocked(key), key=key, encryption_key=self.encryption_key)

    def decode(self, key: str, data: bytes, *, fingerprint: str) -> tuple[BlobHeader, ChunkCache]:
        """Check what the file of a blob of `key`, here or elsewhere, holds; see `decode_file`."""
        self._unlocked(key)
        return decode_file(
            data,
            key=key,
            fingerprint=fingerprint,
            encryption_key=self.encryption_key,
            packed=self.keeps_packed,
        )

    def seal(self, key: str, data: bytes) -> bytes:
        """Return what is to be written for a blob: itself, or encrypted where there is a key."""
        return data if self.encryption_key is None else seal(data, self.encryption_key, key=key)

    def unseal(self, key: str, data: bytes) -> bytes:
        """Return what `seal` was given; `BlobError` if it was changed, or is not encrypted as blobs are here."""
        if not is_sealed(data):
            if self.encryption_key is None:
                return data
            msg = "it is not encrypted, but this store has a key"
            raise BlobError(msg)
        if self.encryption_key is None:
            msg = "it is encrypted, and no key was given"
            raise LockedBlobError(msg)
        return unseal(data, self.encryption_key, key=key)

    def write(self, key: str, data: bytes) -> None:
        """Write a blob completely or not at all."""
        write_file(self.path(key), data, temporary_directory=self.incoming)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove blobs, where they are."""
        for key in keys:
            self.path(key).unlink(missing_ok=True)

    def left_over(self) -> tuple[list[Path], list[str]]:
        """Return half-written files and the keys that were being written; nobody may be writing now."""
        files, keys = [], []
        for path in self.incoming.iterdir() if self.incoming.is_dir() else ():
            if path.name.endswith(TEMPORARY_SUFFIX):
                files.append(path)
            elif path.name.endswith(_MARK) and is_key(path.name.removesuffix(_MARK)):
                files.append(path)
                keys.append(path.name.removesuffix(_MARK))
        return files, keys

    def _unlocked(self, key: str) -> Path:
        if self.locked_by is not None:
            raise LockedBlobError(self.locked_by)
        return self.path(key)

    def all_files(self) -> Iterator[Path]:
        """Return every file below the two directories, in order."""
        for root in (self.directory, self.incoming):
            for folder, folders, names in os.walk(root):
                folders.sort()
                for name in sorted(names):
                    yield Path(folder) / name

    def key_of(self, path: Path) -> str | None:
        """Return whose blob a file is, or `None` if it is no blob in its right place."""
        key = path.name.removesuffix(_SUFFIX)
        return key if is_key(key) and path == self.path(key) else None
