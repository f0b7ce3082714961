"""The header of a blob: read and checked before any memory is taken for its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store import ALONE, LAYOUT_VERSION, Behind, TextEntry, is_key
from prophetkv_rag.store.blobs.formats import BlobFormat, Part, Shape, check_format, packed_sizes

FORMAT = "prophetkv-chunk"
CHECKSUM = "xxh3:"
"""Metadata name of a tensor's checksum: this and the tensor's name."""
LENGTH_BYTES = 8
"""A safetensors file: header length (little-endian), header (JSON), tensors."""
MAX_HEADER_BYTES = 1 << 24  # a thousand layers have less than a megabyte

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
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in the body, `[start, end)`, and what it is."""

    dtype: torch.dtype
    shape: list[int]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Packing:
    """How one layer's keys or values are packed (see `formats`)."""

    blob_format: BlobFormat
    shape: Shape
    suffixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Expected:
    """What a blob must be of; `None` for what is not known."""

    key: str
    fingerprint: str
    num_tokens: int | None


@dataclass(frozen=True, slots=True)
class BlobHeader:
    """A header in which everything fits together, and fits the size of the file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    num_layers: int
    packings: dict[tuple[Part, int], Packing] = field(default_factory=dict)
    behind: Behind = ALONE

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return self.tensors["input_ids"].shape[0]

    @property
    def blob_format(self) -> str:
        """The format of most of its tensors."""
        names = [packing.blob_format for packing in self.packings.values()]
        return max(set(names), key=names.count) if names else "exact"

    @property
    def entry(self) -> TextEntry | None:
        """How the chunk's text is recognised, if the blob says so."""
        try:
            anchor, length, digest = json.loads(self.metadata["entry"])
            return TextEntry(int(anchor), int(length), str(digest))
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def namespace(self) -> str | None:
        """The namespace of its fingerprint, if the blob says so."""
        found = self.metadata.get("namespace")
        return found if isinstance(found, str) else None

    def check(self, expected: Expected) -> None:
        """Raise `BlobError` unless this is the blob that is meant."""
        for name, wanted in (("key", expected.key), ("fingerprint", expected.fingerprint)):
            if self.metadata.get(name) != wanted:
                msg = f"its {name} is {self.metadata.get(name)!r}, expected {wanted!r}"
                raise BlobError(msg)
        if expected.num_tokens not in (None, self.num_tokens):
            msg = f"it is of other token ids: {self.num_tokens} of them instead of {expected.num_tokens}"
            raise BlobError(msg)


def parse_header(data: bytes, body_bytes: int) -> BlobHeader:
    """Read a header, and check that its tensors fill exactly `body_bytes` and have shapes that fit together.

    Raises:
        BlobError: If it cannot be read, is of another version, or does not fit.
    """
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        msg = f"its header cannot be read: {error}"
        raise BlobError(msg) from error
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        msg = "its header has no metadata"
        raise BlobError(msg)
    for name, value in (("format", FORMAT), ("layout_version", str(LAYOUT_VERSION))):
        if metadata.get(name) != value:
            msg = f"its {name} is {metadata.get(name)!r}, expected {value!r}"
            raise BlobError(msg)
    tensors = {str(name): _info(name, info, body_bytes) for name, info in header.items()}
    num_layers = sum(1 for name in tensors if name.startswith("keys.") and name.count(".") == 1)
    if metadata.get("num_layers") != str(num_layers):
        msg = f"its num_layers is {metadata.get('num_layers')!r}, expected {str(num_layers)!r}"
        raise BlobError(msg)
    if sum(info.end - info.start for info in tensors.values()) != body_bytes:
        msg = f"it holds {len(header)} tensors in {body_bytes} bytes, which is not what they take"
        raise BlobError(msg)
    found = BlobHeader(metadata, tensors, num_layers, behind=_behind(metadata))
    _check_tensors(found)
    return found


def _behind(metadata: dict[str, Any]) -> Behind:
    """What else left its trace in the cache; what cannot be read could be anything, so such a blob is bad."""
    if "behind" not in metadata:
        return ALONE
    try:
        keys, through, is_chained = json.loads(metadata["behind"])
        is_sound = all(is_key(key) for key in (*keys, *through)) and isinstance(is_chained, bool)
    except (TypeError, ValueError, RecursionError):
        is_sound = False
    if not is_sound:
        msg = "it does not say in a known way which chunks it was encoded behind"
        raise BlobError(msg)
    return Behind(tuple(keys), tuple(through), is_chained)


def checksum(name: str, dtype_name: str, shape: Sequence[int], data: memoryview) -> str:
    """Return the checksum of a tensor, which covers its name and shape too."""
    found = xxhash.xxh3_64(f"{name} {dtype_name} {list(shape)}".encode())
    found.update(data)
    return found.hexdigest()


def _info(name: str, info: Any, body_bytes: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = _DTYPES[info["dtype"]], info["shape"], info["data_offsets"]
        is_sound = all(type(number) is int and number >= 0 for number in (*shape, start, end))
        is_complete = is_sound and start <= end <= body_bytes and end - start == math.prod(shape) * dtype.itemsize
    except (KeyError, TypeError, ValueError) as error:
        msg = f"its tensor {name} is badly described"
        raise BlobError(msg) from error
    if not is_complete:
        msg = f"its tensor {name} is truncated, or its shape is wrong"
        raise BlobError(msg)
    return TensorInfo(dtype, list(shape), start, end)


def _check_tensors(header: BlobHeader) -> None:
    """Check that exactly the expected tensors are there, with shapes that fit each other; fills in the packings."""
    ids = header.tensors.get("input_ids")
    if ids is None or ids.dtype != torch.int32 or len(ids.shape) != 1 or not header.num_layers:
        msg = "it has no layers, or no list of token ids"
        raise BlobError(msg)
    names = {"input_ids"}
    for layer in range(header.num_layers):
        shapes = [_check_part(header, part, layer, names) for part in ("keys", "values")]
        keys, values = shapes
        if keys.heads != values.heads or keys.dtype != values.dtype or {keys.tokens, values.tokens} != {ids.shape[0]}:
            msg = f"the shapes of layer {layer} are {keys} and {values}, which does not fit {ids.shape[0]} tokens"
            raise BlobError(msg)
    if names != set(header.tensors):
        msg = f"it holds tensors that it should not: {', '.join(sorted(set(header.tensors) - names)[:3])}"
        raise BlobError(msg)


def _check_part(header: BlobHeader, part: Part, layer: int, names: set[str]) -> Shape:
    name = f"{part}.{layer}"
    main = header.tensors.get(name)
    if main is None or len(main.shape) != 3:
        msg = f"its tensor {name} is missing, or does not have three dimensions"
        raise BlobError(msg)
    names.add(name)
    how = header.metadata.get(f"packed:{name}")
    if how is None:
        return Shape(main.shape[0], main.shape[1], main.shape[2], main.dtype)
    try:
        format_name, dtype_name, width = json.loads(how)
        blob_format, dtype = check_format(format_name), _DTYPES[dtype_name]
        shape = Shape(main.shape[0], header.num_tokens, int(width), dtype)
        sizes = packed_sizes(shape, part, blob_format)
    except (TypeError, ValueError, KeyError, RecursionError, ArithmeticError) as error:
        msg = f"its tensor {name} is packed in a way that is not known: {how!r}"
        raise BlobError(msg) from error
    for suffix, (wanted, wanted_dtype) in sizes.items():
        found = header.tensors.get(name + suffix)
        if found is None or found.shape != wanted or found.dtype != wanted_dtype:
            msg = f"its tensor {name}{suffix} should be {wanted_dtype} {wanted} in format {blob_format}"
            raise BlobError(msg)
        names.add(name + suffix)
    header.packings[part, layer] = Packing(blob_format, shape, tuple(sizes))
    return shape
