"""Reading a blob from its file: the header first, checked, then its tensors one after the other, each checked at once.

Read, not mapped. A map would save the copy, but what is mapped is not ours: a file that somebody else truncates kills
the process (SIGBUS), one that is written over changes a cache that was checked already, and one that is evicted keeps
its disk space for as long as the RAM tier holds it. `prophetkv-rag bench load` measures what not mapping costs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO, FileIO
from pathlib import Path

import numpy as np

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store import ChunkCache, Source, read_fully, read_into_fresh
from prophetkv_rag.store.blobs.blob import check_token_ids, decode_body
from prophetkv_rag.store.blobs.header import LENGTH_BYTES, MAX_HEADER_BYTES, BlobHeader, Expected, parse_header
from prophetkv_rag.store.encryption import EncryptionKey, Unsealed, is_sealed

_WILL_NEED: int | None = getattr(os, "POSIX_FADV_WILLNEED", None)
"""Tells the kernel that all of a file follows: from a cold disk, reading by tensors alone reads ahead too little."""


def read_blob(
    path: Path,
    *,
    key: str,
    fingerprint: str,
    input_ids: Sequence[int] | None = None,
    encryption_key: EncryptionKey | None = None,
    packed: bool = False,
) -> tuple[BlobHeader, ChunkCache]:
    """Read and check a blob completely.

    Args:
        path: The file.
        key: Key that the blob must have.
        fingerprint: Fingerprint that the blob must have.
        input_ids: Token ids that the blob must be of, or `None` not to check them.
        encryption_key: Key that the blob must be encrypted with; `None` for one that must not be encrypted.
        packed: See `blob.decode_body`.

    Raises:
        BlobError: If anything differs from what is expected; the message says what.
        OSError: If the file cannot be read.
    """
    with _open(path) as file:
        if _WILL_NEED is not None:
            with suppress(OSError):  # it is advice, which not every file system takes
                os.posix_fadvise(file.fileno(), 0, 0, _WILL_NEED)
        opened = _open_blob(file, os.fstat(file.fileno()).st_size, key, encryption_key)
        opened.header.check(Expected(key, fingerprint, None if input_ids is None else len(input_ids)))
        return opened.header, opened.decode(input_ids, packed)


def read_header(path: Path, *, key: str, encryption_key: EncryptionKey | None = None) -> BlobHeader:
    """Read a blob's header only; its tensors are not checked.

    Raises:
        BlobError: If it is no blob of this version, is encrypted otherwise than `encryption_key` says, or its size is
            not what its header says.
        OSError: If the file cannot be read.
    """
    with _open(path) as file:
        return _open_blob(file, os.fstat(file.fileno()).st_size, key, encryption_key).header


def read_token_ids(path: Path, *, key: str, fingerprint: str, encryption_key: EncryptionKey | None = None) -> list[int]:
    """Read which tokens a blob is of, and check them; its keys and values are not read.

    Raises:
        BlobError: If the header or the ids are not what they should be.
        OSError: If the file cannot be read.
    """
    with _open(path) as file:
        opened = _open_blob(file, os.fstat(file.fileno()).st_size, key, encryption_key)
        opened.header.check(Expected(key, fingerprint, None))
        return opened.token_ids()


def decode_file(
    data: bytes,
    *,
    key: str,
    fingerprint: str | None = None,
    encryption_key: EncryptionKey | None = None,
    packed: bool = False,
) -> tuple[BlobHeader, ChunkCache]:
    """Check what a blob's file holds, as `read_blob` does; of any fingerprint if that is `None`.

    Raises:
        BlobError: If anything differs from what is expected.
    """
    opened = _open_blob(BytesIO(data), len(data), key, encryption_key)
    opened.header.check(Expected(key, fingerprint or str(opened.header.metadata.get("fingerprint")), None))
    return opened.header, opened.decode(None, packed)


@dataclass(frozen=True, slots=True)
class _OpenBlob:
    """A blob whose header has been read and checked.

    Attributes:
        header: The header.
        source: What its tensors are read from.
        step: How many bytes are asked for at once, at least.
    """

    header: BlobHeader
    source: Source
    step: int

    def token_ids(self) -> list[int]:
        """Read and check the token ids alone; of an encrypted blob, also what stands before them."""
        info, skipped = self.header.tensors["input_ids"], 0
        if isinstance(self.source, (FileIO, BytesIO)):
            skipped = info.start
            self.source.seek(skipped, os.SEEK_CUR)
        return check_token_ids(self.header, read_into_fresh(self.source, info.end - skipped)[info.start - skipped :])

    def decode(self, input_ids: Sequence[int] | None, packed: bool) -> ChunkCache:
        """Read and check the tensors."""
        nbytes = max((info.end for info in self.header.tensors.values()), default=0)
        body, done = np.empty(nbytes, dtype=np.uint8).data, 0  # nothing is zeroed

        def arrive(end: int) -> None:
            nonlocal done
            while done < end:
                count = self.source.readinto(body[done : max(end, done + self.step)])
                if not count:
                    msg = "it became shorter while it was read"
                    raise BlobError(msg)
                done += count

        return decode_body(self.header, body, input_ids, arrive=arrive, packed=packed)


def _open(path: Path) -> FileIO:
    return path.open("rb", buffering=0)


def _open_blob(file: FileIO | BytesIO, file_bytes: int, key: str, encryption_key: EncryptionKey | None) -> _OpenBlob:
    source: Source = file
    start, nbytes, step = bytes(read_into_fresh(file, LENGTH_BYTES)), file_bytes, 0
    if is_sealed(start):
        file.seek(0)
        source = unsealed = Unsealed(lambda view: read_fully(file, view), file_bytes, encryption_key, key=key)
        start, nbytes, step = bytes(read_into_fresh(source, LENGTH_BYTES)), unsealed.nbytes, unsealed.segment_bytes
    elif encryption_key is not None:
        # Anybody who can write to the directory can make one, so it proves nothing; and it is not what was asked for.
        msg = "it is not encrypted, but this store has a key"
        raise BlobError(msg)
    size = int.from_bytes(start, "little")
    if nbytes < LENGTH_BYTES or size > min(nbytes - LENGTH_BYTES, MAX_HEADER_BYTES):
        msg = f"it is truncated, or no blob: {nbytes} bytes, its header says {size}"
        raise BlobError(msg)
    header = parse_header(bytes(read_into_fresh(source, size)), nbytes - LENGTH_BYTES - size)
    return _OpenBlob(header, source, step)
