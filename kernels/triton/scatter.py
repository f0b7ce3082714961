"""Triton: rotate fresh queries, keys and values, and write keys and values to their rows of the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prophetkv_rag.kernels.row_moves import move_rows
from prophetkv_rag.kernels.tiles import PROMPT_SIZES, ROW_TILE, must_be_dense, padded, row_warps


@triton.jit(do_not_specialize=PROMPT_SIZES)
def rope_scatter_kernel(
    query_ptr,  # [b, H, m, D]
    key_ptr,  # [b, Hkv, m, D]
    value_ptr,  # [b, Hkv, m, Dv]
    query_out_ptr,  # [b, H, m, D]
    key_out_ptr,  # [b, Hkv, n, D]
    value_out_ptr,  # [b, Hkv, n, Dv]
    rows_ptr,  # [m] int64: where each row goes
    cos_ptr,  # [m, HALF] fp32
    sin_ptr,
    query_stride_batch, query_stride_head, query_stride_row,
    key_stride_batch, key_stride_head, key_stride_row,
    value_stride_batch, value_stride_head, value_stride_row,
    query_out_stride_batch, query_out_stride_head, query_out_stride_row,
    key_out_stride_batch, key_out_stride_head, key_out_stride_row,
    value_out_stride_batch, value_out_stride_head, value_out_stride_row,
    num_rows,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, head: queries' first, then keys', then values', batch)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = row < num_rows
    row = row.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if head < HEADS:
        move_rows(
            query_ptr + batch * query_stride_batch + head * query_stride_head,
            row * query_stride_row,
            query_out_ptr + batch * query_out_stride_batch + head * query_out_stride_head,
            row * query_out_stride_row,
            valid, cos_ptr, sin_ptr, row * HALF, cos_ptr, cos_ptr, row,
            DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, "none", False, False,
        )  # fmt: skip
    elif head < HEADS + KV_HEADS:
        target = tl.load(rows_ptr + row, mask=valid, other=0)
        move_rows(
            key_ptr + batch * key_stride_batch + (head - HEADS) * key_stride_head,
            row * key_stride_row,
            key_out_ptr + batch * key_out_stride_batch + (head - HEADS) * key_out_stride_head,
            target * key_out_stride_row,
            valid, cos_ptr, sin_ptr, row * HALF, cos_ptr, cos_ptr, row,
            DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, "none", False, False,
        )  # fmt: skip
    else:
        target = tl.load(rows_ptr + row, mask=valid, other=0)
        kv_head = head - HEADS - KV_HEADS
        move_rows(
            value_ptr + batch * value_stride_batch + kv_head * value_stride_head,
            row * value_stride_row,
            value_out_ptr + batch * value_out_stride_batch + kv_head * value_out_stride_head,
            target * value_out_stride_row,
            valid, cos_ptr, sin_ptr, row, cos_ptr, cos_ptr, row,
            VALUE_DIM, 0, 1, BLOCK_VALUE, False, "none", False, False,
        )  # fmt: skip


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
    """As `reference.rope_scatter`, in one launch."""
    query_out = None if query is None else torch.empty_like(query)
    _launch(query, query_out, key, value, rows, key_out, value_out, cos, sin, interleaved)
    return query_out


def rotate(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """As `reference.rotate`, in one launch."""
    rotated = torch.empty_like(states) if out is None else out
    shape = (-1, *states.shape[-3:]) if states.dim() > 3 else (1,) * (4 - states.dim()) + tuple(states.shape)
    _launch(states.reshape(shape), rotated.view(shape), None, None, None, None, None, cos, sin, interleaved)
    return rotated


def _launch(
    query: torch.Tensor | None,
    query_out: torch.Tensor | None,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    rows: torch.Tensor | None,
    key_out: torch.Tensor | None,
    value_out: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> None:
    some = query if query is not None else key
    assert some is not None
    dim = some.shape[-1]
    value_dim = dim if value is None else value.shape[-1]
    half = 0 if cos is None else cos.shape[-1]
    num_rows, heads = some.shape[2], 0 if query is None else query.shape[1]
    kv_heads = 0 if key is None else key.shape[1]
    if num_rows == 0:
        return
    must_be_dense(rows=rows)
    tensors = [_dense(tensor, some) for tensor in (query, key, value, query_out, key_out, value_out)]
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    rope_scatter_kernel[(triton.cdiv(num_rows, ROW_TILE), heads + 2 * kv_heads, some.shape[0])](
        *tensors,
        some if rows is None else rows,
        some if cos is None else cos.contiguous(),
        some if sin is None else sin.contiguous(),
        *strides,
        num_rows,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        VALUE_DIM=value_dim,
        HALF=half,
        BLOCK_HALF=padded(half),
        BLOCK_REST=padded(dim - 2 * half),
        BLOCK_VALUE=padded(value_dim),
        INTERLEAVED=interleaved,
        TILE=ROW_TILE,
        num_warps=row_warps(max(dim, value_dim)),
    )


def _dense(tensor: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """The kernel steps through a row's channels by 1; an absent tensor is never touched."""
    if tensor is None:
        return instead
    if tensor.stride(-1) != 1:
        msg = f"rope_scatter needs channels that lie side by side; strides are {tensor.stride()}"
        raise ValueError(msg)
    return tensor
