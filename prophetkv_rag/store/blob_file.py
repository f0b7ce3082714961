"""Reading a blob from its file: the header first, checked, then exactly the bytes that it accounts for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from prophetkv_rag.chunk_cache import ChunkCache
from prophetkv_rag.errors import BlobError
from prophetkv_rag.store.blob import decode_body
from prophetkv_rag.store.blob_header import LENGTH_BYTES, MAX_HEADER_BYTES, BlobHeader, Expected, parse_header
from prophetkv_rag.store.files import read_into_fresh


def read_blob(
    path: Path, *, key: str, fingerprint: str, input_ids: Sequence[int] | None = None
) -> tuple[BlobHeader, ChunkCache]:
    """Read and check a blob completely.

    Args:
        path: The file.
        key: Key that the blob must have.
        fingerprint: Fingerprint that the blob must have.
        input_ids: Token ids that the blob must be of, or `None` not to check them.

    Raises:
        BlobError: If anything differs from what is expected; the message says what.
        OSError: If the file cannot be read.
    """
    with _open(path) as file:
        header, body_bytes = _read_header(file)
        header.check(Expected(key, fingerprint, None if input_ids is None else len(input_ids)))
        body = read_into_fresh(file, body_bytes)
    if len(body) != body_bytes:
        msg = f"it became shorter while it was read: {len(body)} of {body_bytes} bytes"
        raise BlobError(msg)
    return header, decode_body(header, body, input_ids)


def read_header(path: Path) -> BlobHeader:
    """Read a blob's header only; its tensors are not checked.

    Raises:
        BlobError: If it is no blob of this version, or its size is not what its header says.
        OSError: If the file cannot be read.
    """
    with _open(path) as file:
        return _read_header(file)[0]


def _open(path: Path) -> FileIO:
    return path.open("rb", buffering=0)


def _read_header(file: FileIO) -> tuple[BlobHeader, int]:
    file_bytes = os.fstat(file.fileno()).st_size
    size = int.from_bytes(bytes(read_into_fresh(file, LENGTH_BYTES)), "little")
    if file_bytes < LENGTH_BYTES or size > min(file_bytes - LENGTH_BYTES, MAX_HEADER_BYTES):
        msg = f"it is truncated, or no blob: {file_bytes} bytes, its header says {size}"
        raise BlobError(msg)
    body_bytes = file_bytes - LENGTH_BYTES - size
    return parse_header(bytes(read_into_fresh(file, size)), body_bytes), body_bytes
