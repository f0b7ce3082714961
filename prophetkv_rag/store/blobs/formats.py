"""How keys and values are written into a blob: as the model made them, or smaller.

Keys are quantised per channel (along the tokens) and values per token (along the channels), as keys have channels that
are large everywhere. Stored keys are un-rotated, which is what makes that work: a rotation mixes channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from prophetkv_rag.errors import InputError
from prophetkv_rag.store import PackedRows

BlobFormat = Literal["exact", "fp32", "bf16", "fp16", "fp8", "int8", "int4"]
Part = Literal["keys", "values"]

_PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BITS = {"int8": 8, "int4": 4}
_GROUP = {"int8": 1 << 30, "int4": 32}
"""Tokens (of keys) or channels (of values) that share a scale: all of a chunk's for 8 bits."""
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_HALF_MAX = 6e4  # scales and offsets are fp16: larger numbers are stored exactly


def check_format(name: str) -> BlobFormat:
    """Return `name`, or raise `InputError` if it is no format."""
    if name not in get_args(BlobFormat):
        msg = f"blob format {name!r} is not known; allowed: {', '.join(get_args(BlobFormat))}"
        raise InputError(msg)
    return name  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a packed tensor is of: `[num_key_value_heads, num_tokens, width]` and its dtype in the model."""

    heads: int
    tokens: int
    width: int
    dtype: torch.dtype


def pack(tensor: torch.Tensor, part: Part, blob_format: BlobFormat) -> dict[str, torch.Tensor]:
    """Return the tensors to store for one layer's keys or values, by suffix ("" for the main one).

    A tensor that the format cannot hold (not finite, or beyond fp16's range) is stored as it is.
    """
    if blob_format == "exact" or _PLAIN.get(blob_format) == tensor.dtype:
        return {"": tensor}
    if tensor.numel() == 0 or not bool(tensor.abs().max() < _HALF_MAX):
        return {"": tensor}
    if blob_format in _PLAIN:
        return {"": tensor.to(_PLAIN[blob_format])}
    rows = _rows(tensor, part)  # [heads, lines, along]
    if blob_format == "fp8":
        scale = (rows.abs().amax(dim=-1, keepdim=True) / _FP8_MAX).clamp(min=2.0**-14).half()
        packed = (rows / scale.float()).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8)
        return {"": _unrows(packed, part), ".scale": scale}
    bits, group = _BITS[blob_format], min(_GROUP[blob_format], rows.shape[-1])
    padding = -rows.shape[-1] % group
    # Padded with the last number, which changes no minimum and no maximum.
    padded = torch.cat([rows, rows[..., -1:].expand(*rows.shape[:2], padding)], -1)
    grouped = padded.view(*rows.shape[:2], -1, group)
    low = grouped.amin(-1, keepdim=True).half()
    scale = ((grouped.amax(-1, keepdim=True) - low.float()) / (2**bits - 1)).clamp(min=2.0**-14).half()
    levels = ((grouped - low.float()) / scale.float()).round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    levels = levels[..., : rows.shape[-1]]
    if bits == 4:
        levels = torch.nn.functional.pad(levels, (0, levels.shape[-1] % 2))
        levels = levels[..., ::2] | (levels[..., 1::2] << 4)
    else:
        levels = _unrows(levels, part)
    return {"": levels, ".scale": scale.squeeze(-1), ".low": low.squeeze(-1)}


def packed_sizes(shape: Shape, part: Part, blob_format: BlobFormat) -> dict[str, tuple[list[int], torch.dtype]]:
    """Return shape and dtype of every tensor that `pack` makes, by suffix: what a header must say to be believed."""
    plain = [shape.heads, shape.tokens, shape.width]
    lines, along = (shape.width, shape.tokens) if part == "keys" else (shape.tokens, shape.width)
    if blob_format == "exact" or blob_format in _PLAIN:
        return {"": (plain, _PLAIN.get(blob_format, shape.dtype))}
    if blob_format == "fp8":
        return {"": (plain, _FP8), ".scale": ([shape.heads, lines, 1], torch.float16)}
    groups = [shape.heads, lines, math.ceil(along / min(_GROUP[blob_format], along))]
    main = [shape.heads, lines, math.ceil(along / 2)] if blob_format == "int4" else plain
    return {"": (main, torch.uint8), ".scale": (groups, torch.float16), ".low": (groups, torch.float16)}


def unpack(stored: Mapping[str, torch.Tensor], part: Part, blob_format: BlobFormat, shape: Shape) -> torch.Tensor:
    """Return `[heads, tokens, width]` in the model's dtype from what `pack` made (checked by `packed_sizes`)."""
    if blob_format != "int4":
        return _as_rows(stored, part, shape).unpack()
    main, scale = stored[""], stored[".scale"].float()
    along = shape.tokens if part == "keys" else shape.width
    levels = torch.stack([main & 15, main >> 4], dim=-1).flatten(-2)[..., :along].float()
    group = min(_GROUP[blob_format], along)
    scale, low = (each.repeat_interleave(group, dim=-1)[..., :along] for each in (scale, stored[".low"].float()))
    return _unrows(levels.mul_(scale).add_(low), part).to(shape.dtype).contiguous()


def packed_rows(
    stored: Mapping[str, torch.Tensor], part: Part, blob_format: BlobFormat, shape: Shape
) -> PackedRows | None:
    """Return what `unpack` takes in the form that kernels read; `None` for what had better be unpacked at once.

    That is int4, whose numbers share bytes, and what is no smaller than the numbers it stands for.
    """
    if blob_format == "int4" or stored[""].dtype.itemsize >= shape.dtype.itemsize:
        return None
    return _as_rows(stored, part, shape)


def _as_rows(stored: Mapping[str, torch.Tensor], part: Part, shape: Shape) -> PackedRows:
    scale, low = stored.get(".scale"), stored.get(".low")
    if part == "keys":  # stored by channel, [heads, width, 1]
        scale, low = (None if tensor is None else tensor.transpose(1, 2) for tensor in (scale, low))
    return PackedRows(stored[""], scale, low, shape.dtype)


def _rows(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """Return fp32 `[heads, lines, along]`: a line is what shares scales, a channel of keys or a token of values."""
    return (tensor.transpose(1, 2) if part == "keys" else tensor).float()


def _unrows(rows: torch.Tensor, part: Part) -> torch.Tensor:
    return rows.transpose(1, 2).contiguous() if part == "keys" else rows
