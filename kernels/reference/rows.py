"""PyTorch implementations of what moves rows: chunk caches into a cache, fresh rows into a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prophetkv_rag.kernels.reference import rotate
from prophetkv_rag.kernels.row_source import RowSource


def _dequantised(rows: torch.Tensor, scale: torch.Tensor | None, low: torch.Tensor | None) -> torch.Tensor:
    if rows.dtype == torch.uint8 and low is None:
        rows = rows.view(torch.float8_e4m3fn)
    if scale is None:
        return rows if rows.dtype in (torch.float16, torch.bfloat16, torch.float32) else rows.float()
    numbers = rows.float().mul_(scale) if rows.dtype != torch.float32 else rows * scale
    return numbers if low is None else numbers.add_(low)


def rope_gather(
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    sources: Sequence[RowSource],
    starts: Sequence[int],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    interleaved: bool = False,
) -> None:
    """Put chunks' caches into one cache: dequantise, rotate keys, copy values.

    Args:
        key_out: `[Hkv, n, D]`; rows outside the chunks are left as they are.
        value_out: `[Hkv, n, Dv]`.
        sources: The chunks, on the cache's device.
        starts: Row of the cache for each chunk's first token.
        cos: `[tokens of all chunks, r]` with 2r <= D, fp32, in the chunks' order; `None` to not rotate.
        sin: Alike.
        interleaved: As in `rotate`.
    """
    first = 0
    for source, start in zip(sources, starts, strict=True):
        source.check()
        last, rows = first + source.num_tokens, slice(start, start + source.num_tokens)
        keys = _dequantised(source.keys, source.key_scale, source.key_low)
        if cos is None or sin is None:
            key_out[:, rows] = keys
        else:
            rotate(keys, cos[first:last], sin[first:last], interleaved=interleaved, out=key_out[:, rows])
        value_out[:, rows] = _dequantised(source.values, source.value_scale, source.value_low)
        first = last


def rope_scatter(
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    *,
    query: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor | None:
    """Write fresh rows into the cache, rotating queries and keys if they are not rotated yet.

    Args:
        key: `[b, Hkv, m, D]`.
        value: `[b, Hkv, m, Dv]`.
        rows: `[m]`, int64, all different: where each goes.
        key_out: `[b, Hkv, n, D]`; other rows are left as they are.
        value_out: `[b, Hkv, n, Dv]`.
        query: `[b, H, m, D]`, to be rotated too, or `None`.
        cos: `[m, r]`, fp32; `None` if queries and keys are rotated already.
        sin: Alike.
        interleaved: As in `rotate`.

    Returns:
        The rotated queries, or `None` if none were given.
    """
    if cos is not None and sin is not None:
        key = rotate(key, cos, sin, interleaved=interleaved)
        query = None if query is None else rotate(query, cos, sin, interleaved=interleaved)
    key_out.index_copy_(2, rows, key)
    value_out.index_copy_(2, rows, value)
    return query
