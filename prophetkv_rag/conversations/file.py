"""Remembered rows as one safetensors file, and back: nothing comes out of it that cannot be proven.

    metadata                format, version, the identity of what computed them, the runs (JSON), a digest of all of it
    token_ids, states       `[T]`, int32 and uint8
    shifts                  `[T]`, int32: a row's position minus the one that its keys are rotated to
    keys.<layer>            `[Hkv, T, D]`; values.<layer> alike

The text can be read from the token ids, and from the rows: who may read the file may read the conversations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError

from prophetkv_rag.conversations.rows import RowState, Trace
from prophetkv_rag.conversations.saved import Run, SavedRows
from prophetkv_rag.errors import BlobError
from prophetkv_rag.store import is_key

FORMAT = "prophetkv-conversations"
VERSION = "2"
_LENGTH_BYTES = 8  # a safetensors file: header length (little-endian), header (JSON), tensors


class RowShape(NamedTuple):
    """What one layer's rows must look like: key/value heads, and the width of keys and of values."""

    heads: int
    key_width: int
    value_width: int


def encode_rows(saved: SavedRows, identity: Mapping[str, str]) -> bytes:
    """Serialise rows.

    Args:
        saved: The rows.
        identity: What they depend on beside their tokens; only those of the same are read back.
    """
    tensors = {"token_ids": saved.token_ids.to(torch.int32), "states": saved.states}
    tensors["shifts"] = saved.shifts.to(torch.int32)
    for layer, (keys, values) in enumerate(saved.rows):
        tensors[f"keys.{layer}"], tensors[f"values.{layer}"] = keys, values
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "identity": json.dumps(dict(identity)),
        "runs": json.dumps([_run_to_json(run) for run in saved.runs]),
    }
    metadata["digest"] = _digest(metadata, tensors)
    return bytes(safetensors.torch.save(tensors, metadata))


def decode_rows(data: bytes, identity: Mapping[str, str], shapes: Sequence[RowShape], dtype: torch.dtype) -> SavedRows:
    """Check a whole file and return its rows.

    Args:
        data: The file.
        identity: As it was given to `encode_rows`.
        shapes: Of each layer's rows.
        dtype: Of the rows.

    Raises:
        BlobError: If it is damaged, or of another identity; the message says which part of it.
    """
    metadata = _metadata_of(data)
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        msg = f"it is damaged: {error}"
        raise BlobError(msg) from error
    if metadata.get("digest") != _digest(metadata, tensors):
        msg = "it is damaged: its digest is wrong"
        raise BlobError(msg)
    theirs = json.loads(metadata["identity"])
    for name, value in identity.items():
        if theirs.get(name) != value:
            msg = f"it was saved with another {name}, and such rows are of no use here"
            raise BlobError(msg)
    return _checked(metadata, tensors, shapes, dtype)


def _metadata_of(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    try:
        header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + size])
        metadata = header["__metadata__"]
        found = metadata["format"], metadata["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        msg = f"it is damaged, encrypted, or no file of conversations: {len(data)} bytes"
        raise BlobError(msg) from error
    if found != (FORMAT, VERSION):
        msg = f"its format is {found[0]!r} {found[1]!r}, expected {FORMAT!r} {VERSION!r}"
        raise BlobError(msg)
    return dict(metadata)


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the digest of everything that the file says, names, dtypes and shapes included."""
    found = xxhash.xxh3_128()
    for name in sorted(metadata):
        if name != "digest":
            found.update(json.dumps([name, metadata[name]]).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _checked(
    metadata: Mapping[str, str], tensors: dict[str, torch.Tensor], shapes: Sequence[RowShape], dtype: torch.dtype
) -> SavedRows:
    """Return the rows, if everything fits together: a digest proves that nothing was changed, not that it is sound."""
    names = {f"{part}.{layer}" for layer in range(len(shapes)) for part in ("keys", "values")}
    try:
        runs = [_run_from_json(one) for one in json.loads(metadata["runs"])]
        num_tokens = sum(run.length for run in runs)
        is_sound = (
            set(tensors) == names | {"token_ids", "states", "shifts"}
            and all(-1 <= run.parent < number and run.length > 0 for number, run in enumerate(runs))
            and all(1 <= run.used <= len(runs) for run in runs)
            and all(trace.start >= 0 for run in runs for trace in run.traces)
            and all(tensors[name].shape == (num_tokens,) for name in ("token_ids", "states", "shifts"))
            and tensors["token_ids"].dtype == tensors["shifts"].dtype == torch.int32
            and tensors["states"].dtype == torch.uint8
            and bool((tensors["states"] <= max(RowState)).all())
            and all(
                tensors[name].shape == (shape.heads, num_tokens, width) and tensors[name].dtype == dtype
                for layer, shape in enumerate(shapes)
                for name, width in ((f"keys.{layer}", shape.key_width), (f"values.{layer}", shape.value_width))
            )
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        is_sound = False
    if not is_sound:
        msg = "its parts do not fit together"
        raise BlobError(msg)
    rows = [(tensors[f"keys.{layer}"], tensors[f"values.{layer}"]) for layer in range(len(shapes))]
    token_ids, shifts = tensors["token_ids"].to(torch.int64), tensors["shifts"].to(torch.int64)
    return SavedRows(runs, token_ids, tensors["states"], rows, shifts)


def _run_to_json(run: Run) -> list[Any]:
    traces = [[trace.start, sorted(trace.keys)] for trace in run.traces]
    return [run.parent, run.length, traces, sorted(run.prompts), run.used]


def _run_from_json(found: list[Any]) -> Run:
    parent, length, traces, prompts, used = found
    if not all(isinstance(number, int) for number in (parent, length, used)):
        raise TypeError
    if not all(is_key(key) for _, keys in traces for key in keys):
        raise ValueError
    return Run(
        parent,
        length,
        tuple(Trace(int(start), frozenset(keys)) for start, keys in traces),
        frozenset((int(end), str(settings)) for end, settings in prompts),
        used,
    )
