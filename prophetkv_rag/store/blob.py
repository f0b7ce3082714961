"""One chunk cache as one safetensors file: tensors `input_ids`, `keys.<layer>`, `values.<layer>`, and what proves them.

Written by the safetensors library, so every tool reads it. Read by hand, because the library copies each tensor once
more (measured on 12 MB: 1.0 ms against 2.5 ms): here all tensors are views of the one buffer that the file was read
into. Nothing in a blob is trusted: whatever does not match exactly what is asked for raises `BlobError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import safetensors.torch
import torch
import xxhash

from prophetkv_rag.chunk_cache import LAYOUT_VERSION, ChunkCache
from prophetkv_rag.errors import BlobError
from prophetkv_rag.store.ram import has_ids, owned

Buffer: TypeAlias = bytes | bytearray | memoryview

FORMAT = "prophetkv-chunk"
_CHECKSUM = "xxh3:"  # metadata name of a tensor's checksum: this and the tensor's name
_LENGTH_BYTES = 8  # a safetensors file: header length (little-endian), header (JSON), tensors
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def encode_blob(cache: ChunkCache, *, key: str, fingerprint: str) -> bytes:
    """Serialise a chunk cache.

    Args:
        cache: Tensors of any dtype that safetensors knows, on any device.
        key: The chunk's key; stored, so that a renamed file is noticed.
        fingerprint: `CacheIdentity.fingerprint` of the engine that made the cache.
    """
    tensors = _named(owned(cache))
    metadata = {
        "format": FORMAT,
        "layout_version": str(LAYOUT_VERSION),
        "key": key,
        "fingerprint": fingerprint,
        "num_layers": str(len(cache.keys)),
    }
    for name, tensor in tensors.items():
        data = tensor.view(-1).view(torch.uint8).numpy().data
        metadata[_CHECKSUM + name] = _checksum(name, _DTYPE_NAMES[tensor.dtype], tensor.shape, data)
    return bytes(safetensors.torch.save(tensors, metadata))


def decode_blob(data: Buffer, *, key: str, fingerprint: str, input_ids: Sequence[int] | None = None) -> ChunkCache:
    """Check a blob completely and return its cache, whose tensors are views of `data` where that is writable.

    Args:
        data: The whole file.
        key: Key that the blob must have.
        fingerprint: Fingerprint that the blob must have.
        input_ids: Token ids that the blob must be of, or `None` not to check them (while verifying a store).

    Raises:
        BlobError: If anything differs from what is expected; the message says what.
    """
    view = memoryview(bytearray(data) if memoryview(data).readonly else data).cast("B")  # torch wants writable memory
    header, body = _split(view)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict):
        msg = "its header has no metadata"
        raise BlobError(msg)
    expected = {
        "format": FORMAT,
        "layout_version": str(LAYOUT_VERSION),
        "key": key,
        "fingerprint": fingerprint,
        "num_layers": str((len(header) - 1) // 2),
    }
    for name, value in expected.items():
        if metadata.get(name) != value:
            msg = f"its {name} is {metadata.get(name)!r}, expected {value!r}"
            raise BlobError(msg)
    tensors = {name: _tensor(name, header.get(name), metadata, body) for name in _names((len(header) - 1) // 2)}
    if len(tensors) != len(header) or sum(tensor.nbytes for tensor in tensors.values()) != len(body):
        msg = f"it holds {len(header)} tensors in {len(body)} bytes, which is more than it should"
        raise BlobError(msg)
    layers = range(len(tensors) // 2)
    cache = ChunkCache(
        tensors["input_ids"],
        tuple(tensors[f"keys.{layer}"] for layer in layers),
        tuple(tensors[f"values.{layer}"] for layer in layers),
    )
    _check_shapes(cache)
    if input_ids is not None and not has_ids(cache, input_ids):
        msg = "it is of other token ids"
        raise BlobError(msg)
    return cache


def _names(num_layers: int) -> list[str]:
    return ["input_ids", *(f"{part}.{layer}" for layer in range(num_layers) for part in ("keys", "values"))]


def _named(cache: ChunkCache) -> dict[str, torch.Tensor]:
    layers = [tensor for layer in zip(cache.keys, cache.values, strict=True) for tensor in layer]
    return dict(zip(_names(len(cache.keys)), [cache.input_ids, *layers], strict=True))


def _split(view: memoryview) -> tuple[dict[str, Any], memoryview]:
    size = int.from_bytes(view[:_LENGTH_BYTES], "little")
    if len(view) < _LENGTH_BYTES or size > len(view) - _LENGTH_BYTES:
        msg = f"it is truncated: {len(view)} bytes"
        raise BlobError(msg)
    try:
        header = json.loads(bytes(view[_LENGTH_BYTES : _LENGTH_BYTES + size]))
    except (ValueError, RecursionError) as error:
        msg = f"its header cannot be read: {error}"
        raise BlobError(msg) from error
    if not isinstance(header, dict):
        msg = "its header is not a table"
        raise BlobError(msg)
    return header, view[_LENGTH_BYTES + size :]


def _tensor(name: str, info: Any, metadata: dict[str, Any], body: memoryview) -> torch.Tensor:
    try:
        dtype_name, shape, (start, end) = info["dtype"], [int(size) for size in info["shape"]], info["data_offsets"]
        dtype = _DTYPES[dtype_name]
        size = math.prod(shape) * dtype.itemsize
        is_complete = min(shape) >= 0 and 0 <= start <= end <= len(body) and end - start == size
    except (KeyError, TypeError, ValueError) as error:
        msg = f"its tensor {name} is missing or badly described"
        raise BlobError(msg) from error
    if not is_complete:
        msg = f"its tensor {name} is truncated, or its shape is wrong"
        raise BlobError(msg)
    data = body[start:end]
    if metadata.get(_CHECKSUM + name) != _checksum(name, dtype_name, shape, data):
        msg = f"the checksum of its tensor {name} is wrong"
        raise BlobError(msg)
    return torch.frombuffer(data, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def _checksum(name: str, dtype_name: str, shape: Sequence[int], data: memoryview) -> str:
    checksum = xxhash.xxh3_64(f"{name} {dtype_name} {list(shape)}".encode())
    checksum.update(data)
    return checksum.hexdigest()


def _check_shapes(cache: ChunkCache) -> None:
    if cache.input_ids.dtype != torch.int32 or cache.input_ids.ndim != 1 or not cache.keys:
        msg = "it has no layers, or no list of token ids"
        raise BlobError(msg)
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        shapes_fit = keys.ndim == values.ndim == 3 and keys.shape[:2] == values.shape[:2]
        if not shapes_fit or keys.shape[1] != cache.num_tokens or keys.dtype != values.dtype:
            shapes = f"{list(keys.shape)} and {list(values.shape)}"
            msg = f"the shapes of layer {layer} are {shapes}, which does not fit {cache.num_tokens} tokens"
            raise BlobError(msg)
