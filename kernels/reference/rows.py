"""PyTorch: what moves rows, rotating them on the way: chunk caches into a cache, fresh rows into a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prophetkv_rag.kernels.arguments import Angles, States
from prophetkv_rag.kernels.row_source import RowSource


def rotate(states: torch.Tensor, angles: Angles, out: torch.Tensor | None = None) -> torch.Tensor:
    """Turn `[..., n, D]` in fp32, the two channels of every pair at once."""
    cos, sin, interleaved = angles
    half = cos.shape[-1]
    rotated = torch.empty_like(states) if out is None else out
    if interleaved:
        one, other = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        one, other = slice(half), slice(half, 2 * half)
    first, second = states[..., one].float(), states[..., other].float()
    rotated[..., one].copy_(torch.addcmul(first * cos, second, sin, value=-1))
    rotated[..., other].copy_(torch.addcmul(second * cos, first, sin))
    if states.shape[-1] > 2 * half:
        rotated[..., 2 * half :] = states[..., 2 * half :]
    return rotated


def rope_gather(out: States, sources: Sequence[RowSource], starts: Sequence[int], angles: Angles | None) -> None:
    """One chunk after the other."""
    first = 0
    for source, start in zip(sources, starts, strict=True):
        source.check()
        last, rows = first + source.num_tokens, slice(start, start + source.num_tokens)
        keys = _dequantised(source.keys, source.key_scale, source.key_low)
        if angles is None:
            out.key[:, rows] = keys
        else:
            rotate(keys, angles.of_rows(first, last), out.key[:, rows])
        out.value[:, rows] = _dequantised(source.values, source.value_scale, source.value_low)
        first = last


def _dequantised(rows: torch.Tensor, scale: torch.Tensor | None, low: torch.Tensor | None) -> torch.Tensor:
    if rows.dtype == torch.uint8 and low is None:
        rows = rows.view(torch.float8_e4m3fn)
    if scale is None:
        return rows if rows.dtype in (torch.float16, torch.bfloat16, torch.float32) else rows.float()
    numbers = rows.float().mul_(scale) if rows.dtype != torch.float32 else rows * scale
    return numbers if low is None else numbers.add_(low)


def rope_scatter(fresh: States, rows: torch.Tensor, out: States, angles: Angles | None) -> torch.Tensor | None:
    """Rotate, then copy; returns the queries."""
    key, query = fresh.key, fresh.query
    if angles is not None:
        key = rotate(key, angles)
        query = None if query is None else rotate(query, angles)
    out.key.index_copy_(2, rows, key)
    out.value.index_copy_(2, rows, fresh.value)
    return query
