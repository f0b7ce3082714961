"""One chunk cache as one safetensors file: tensors `input_ids`, `keys.<layer>`, `values.<layer>`, and what proves them.

Written by the safetensors library, so every tool reads it. Read by hand, because the library copies each tensor once
more (measured on 12 MB: 1.0 ms against 2.5 ms): here all tensors are views of the one buffer that the file was read
into. Nothing in a blob is trusted: whatever does not match exactly what is asked for raises `BlobError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import safetensors.torch
import torch

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store import LAYOUT_VERSION, ChunkCache, PackedCache, PackedRows, TextEntry
from prophetkv_rag.store.blobs.formats import BlobFormat, Part, pack, packed_rows, unpack
from prophetkv_rag.store.blobs.header import (
    CHECKSUM,
    DTYPE_NAMES,
    FORMAT,
    LENGTH_BYTES,
    BlobHeader,
    Expected,
    checksum,
    parse_header,
)

Buffer: TypeAlias = bytes | bytearray | memoryview

__all__ = ["FORMAT", "decode_blob", "decode_body", "encode_blob", "parse_blob_header"]


def encode_blob(
    cache: ChunkCache,
    *,
    key: str,
    fingerprint: str,
    blob_format: BlobFormat = "exact",
    entry: TextEntry | None = None,
    namespace: str | None = None,
) -> bytes:
    """Serialise a chunk cache.

    Args:
        cache: Tensors of any dtype that safetensors knows, on any device.
        key: The chunk's key; stored, so that a renamed file is noticed.
        fingerprint: `CacheIdentity.fingerprint` of the engine that made the cache.
        blob_format: How keys and values are written; `"exact"` is bit for bit.
        entry: How the chunk's text is recognised, so that a lost catalog can be made again.
        namespace: What the fingerprint is of, if that is known; for the same reason.
    """
    cache = cache.owned()
    tensors = {"input_ids": cache.input_ids}
    metadata = {
        "format": FORMAT,
        "layout_version": str(LAYOUT_VERSION),
        "key": key,
        "fingerprint": fingerprint,
        "num_layers": str(len(cache.keys)),
    }
    if entry is not None:
        metadata["entry"] = json.dumps([entry.anchor, entry.length, entry.digest])
    if namespace is not None:
        metadata["namespace"] = namespace
    if cache.behind.keys:
        metadata["behind"] = json.dumps([cache.behind.keys, cache.behind.through, cache.behind.is_chained])
    for layer, pair in enumerate(zip(cache.keys, cache.values, strict=True)):
        for part, tensor in zip(_PARTS, pair, strict=True):
            packed = pack(tensor, part, blob_format)
            if len(packed) > 1 or packed[""].dtype != tensor.dtype:
                width = tensor.shape[-1]
                metadata[f"packed:{part}.{layer}"] = json.dumps([blob_format, DTYPE_NAMES[tensor.dtype], width])
            for suffix, stored in packed.items():
                tensors[f"{part}.{layer}{suffix}"] = stored.contiguous()
    for name, tensor in tensors.items():
        data = tensor.view(-1).view(torch.uint8).numpy().data
        metadata[CHECKSUM + name] = checksum(name, DTYPE_NAMES[tensor.dtype], tensor.shape, data)
    return bytes(safetensors.torch.save(tensors, metadata))


_PARTS: tuple[Part, Part] = ("keys", "values")


def decode_blob(
    data: Buffer,
    *,
    key: str,
    fingerprint: str,
    input_ids: Sequence[int] | None = None,
    packed: bool = False,
) -> ChunkCache:
    """Check a blob completely and return its cache, whose tensors are views of `data` where that is writable.

    Args:
        data: The whole file.
        key: Key that the blob must have.
        fingerprint: Fingerprint that the blob must have.
        input_ids: Token ids that the blob must be of, or `None` not to check them (while verifying a store).
        packed: See `decode_body`.

    Raises:
        BlobError: If anything differs from what is expected; the message says what.
    """
    view = memoryview(bytearray(data) if memoryview(data).readonly else data).cast("B")  # torch wants writable memory
    header, body = _split(view)
    header.check(Expected(key, fingerprint, None if input_ids is None else len(input_ids)))
    return decode_body(header, body, input_ids, packed=packed)


def parse_blob_header(data: Buffer) -> BlobHeader:
    """Return the header of a whole blob; `BlobError` if it is none. Its tensors are not checked."""
    return _split(memoryview(data).cast("B"))[0]


def _split(view: memoryview) -> tuple[BlobHeader, memoryview]:
    size = int.from_bytes(view[:LENGTH_BYTES], "little")
    if len(view) < LENGTH_BYTES or size > len(view) - LENGTH_BYTES:
        msg = f"it is truncated: {len(view)} bytes"
        raise BlobError(msg)
    body = view[LENGTH_BYTES + size :]
    return parse_header(bytes(view[LENGTH_BYTES : LENGTH_BYTES + size]), len(body)), body


def decode_body(
    header: BlobHeader,
    body: memoryview,
    input_ids: Sequence[int] | None,
    *,
    arrive: Callable[[int], None] = lambda end: None,
    packed: bool = False,
) -> ChunkCache:
    """Check the checksums of a blob whose header has been checked, and return its cache.

    Args:
        header: The checked header.
        body: The tensors' bytes, which become the cache's memory.
        input_ids: Token ids that the blob must be of, or `None` not to check them.
        arrive: Called before `body[:end]` is looked at, to fill it, so that tensors are checked as they come.
        packed: Leave what kernels can read packed as it is (`PackedCache`).

    Raises:
        BlobError: If a checksum or the token ids are wrong.
    """
    tensors = {}
    for name, info in sorted(header.tensors.items(), key=lambda item: item[1].start):
        arrive(info.end)
        data = body[info.start : info.end]
        if header.metadata.get(CHECKSUM + name) != checksum(name, DTYPE_NAMES[info.dtype], info.shape, data):
            msg = f"the checksum of its tensor {name} is wrong"
            raise BlobError(msg)
        tensors[name] = (
            torch.frombuffer(data, dtype=info.dtype).view(info.shape)
            if len(data)
            else torch.empty(info.shape, dtype=info.dtype)
        )
    keys, values = (
        [_rows(header, tensors, part, layer, packed) for layer in range(header.num_layers)] for part in _PARTS
    )
    if any(rows.is_packed for rows in (*keys, *values)):
        cache: ChunkCache = PackedCache(tensors["input_ids"], keys, values, header.behind)
    else:
        stored_keys, stored_values = (tuple(rows.stored for rows in part) for part in (keys, values))
        cache = ChunkCache(tensors["input_ids"], stored_keys, stored_values, header.behind)
    if input_ids is not None and not cache.has_ids(input_ids):
        msg = "it is of other token ids"
        raise BlobError(msg)
    return cache


def check_token_ids(header: BlobHeader, data: Buffer) -> list[int]:
    """Return the token ids that the bytes of that tensor say; `BlobError` if their checksum is wrong."""
    info, name = header.tensors["input_ids"], "input_ids"
    if header.metadata.get(CHECKSUM + name) != checksum(name, DTYPE_NAMES[info.dtype], info.shape, memoryview(data)):
        msg = f"the checksum of its tensor {name} is wrong"
        raise BlobError(msg)
    ids: list[int] = torch.frombuffer(bytearray(data), dtype=info.dtype).tolist()
    return ids


def _rows(header: BlobHeader, tensors: Mapping[str, torch.Tensor], part: Part, layer: int, packed: bool) -> PackedRows:
    packing, name = header.packings.get((part, layer)), f"{part}.{layer}"
    if packing is None:
        return PackedRows(tensors[name], None, None, tensors[name].dtype)
    stored = {suffix: tensors[name + suffix] for suffix in packing.suffixes}
    rows = packed_rows(stored, part, packing.blob_format, packing.shape) if packed else None
    if rows is None:
        rows = PackedRows(unpack(stored, part, packing.blob_format, packing.shape), None, None, packing.shape.dtype)
    return rows
