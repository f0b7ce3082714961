"""Triton: rotate fresh queries, keys and values, and write keys and values to their rows of the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prophetkv_rag.kernels.arguments import Angles, States
from prophetkv_rag.kernels.triton.launch import must_be_dense, row_arguments
from prophetkv_rag.kernels.triton.row_moves import move_rows
from prophetkv_rag.kernels.triton.tiles import PROMPT_SIZES, ROW_TILE

_Three = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""Of queries, keys and values."""


@triton.jit
def _move_head(
    src_ptr, src_stride_batch, src_stride_head, src_stride_row,
    dst_ptr, dst_stride_batch, dst_stride_head, dst_stride_row,
    head, row, target, valid, cos_ptr, sin_ptr,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    move_rows(
        src_ptr + batch * src_stride_batch + head * src_stride_head,
        row * src_stride_row,
        dst_ptr + batch * dst_stride_batch + head * dst_stride_head,
        target * dst_stride_row,
        valid, cos_ptr, sin_ptr, row * HALF, cos_ptr, cos_ptr, row,
        DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, "none", False, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=PROMPT_SIZES)
def scatter_kernel(
    query_ptr,  # [b, H, m, D]
    key_ptr,  # [b, Hkv, m, D]
    value_ptr,  # [b, Hkv, m, Dv]
    query_out_ptr,  # [b, H, m, D]
    key_out_ptr,  # [b, Hkv, n, D]
    value_out_ptr,  # [b, Hkv, n, Dv]
    rows_ptr,  # [m] int64: where each row goes
    query_stride_batch, query_stride_head, query_stride_row,
    key_stride_batch, key_stride_head, key_stride_row,
    value_stride_batch, value_stride_head, value_stride_row,
    query_out_stride_batch, query_out_stride_head, query_out_stride_row,
    key_out_stride_batch, key_out_stride_head, key_out_stride_row,
    value_out_stride_batch, value_out_stride_head, value_out_stride_row,
    num_rows,
    cos_ptr,  # [m, HALF] fp32
    sin_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    INTERLEAVED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, head: queries' first, then keys', then values', batch)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = row < num_rows
    row = row.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    if head < HEADS:
        _move_head(
            query_ptr, query_stride_batch, query_stride_head, query_stride_row,
            query_out_ptr, query_out_stride_batch, query_out_stride_head, query_out_stride_row,
            head, row, row, valid, cos_ptr, sin_ptr, DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
    else:
        target = tl.load(rows_ptr + row, mask=valid, other=0)
        if head < HEADS + KV_HEADS:
            _move_head(
                key_ptr, key_stride_batch, key_stride_head, key_stride_row,
                key_out_ptr, key_out_stride_batch, key_out_stride_head, key_out_stride_row,
                head - HEADS, row, target, valid, cos_ptr, sin_ptr, DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED,
            )  # fmt: skip
        else:
            _move_head(
                value_ptr, value_stride_batch, value_stride_head, value_stride_row,
                value_out_ptr, value_out_stride_batch, value_out_stride_head, value_out_stride_row,
                head - HEADS - KV_HEADS, row, target, valid, cos_ptr, sin_ptr, VALUE_DIM, 0, 1, BLOCK_VALUE, False,
            )  # fmt: skip


def rope_scatter(fresh: States, rows: torch.Tensor, out: States, angles: Angles | None) -> torch.Tensor | None:
    """In one launch."""
    query_out = None if fresh.query is None else torch.empty_like(fresh.query)
    _launch((fresh.query, fresh.key, fresh.value), (query_out, out.key, out.value), rows, angles)
    return query_out


def rotate(states: torch.Tensor, angles: Angles, out: torch.Tensor | None = None) -> torch.Tensor:
    """In one launch, as queries."""
    rotated = torch.empty_like(states) if out is None else out
    shape = (-1, *states.shape[-3:]) if states.dim() > 3 else (1,) * (4 - states.dim()) + tuple(states.shape)
    _launch((states.reshape(shape), None, None), (rotated.view(shape), None, None), None, angles)
    return rotated


def _launch(sources: _Three, targets: _Three, rows: torch.Tensor | None, angles: Angles | None) -> None:
    query, key, value = sources
    some = query if query is not None else key
    assert some is not None
    batch, _, num_rows, dim = some.shape
    heads, kv_heads = (0 if states is None else states.shape[1] for states in (query, key))
    if num_rows == 0:
        return
    must_be_dense(rows=rows)
    tensors = [_dense(tensor, some) for tensor in (*sources, *targets)]
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    scatter_kernel[(triton.cdiv(num_rows, ROW_TILE), heads + 2 * kv_heads, batch)](
        *tensors,
        some if rows is None else rows,
        *strides,
        num_rows,
        HEADS=heads,
        KV_HEADS=kv_heads,
        **row_arguments(dim, dim if value is None else value.shape[-1], angles, some),
    )


def _dense(tensor: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """The kernel steps through a row's channels by 1; an absent tensor is never touched."""
    if tensor is None:
        return instead
    if tensor.stride(-1) != 1:
        msg = f"rope_scatter needs channels that lie side by side; strides are {tensor.stride()}"
        raise ValueError(msg)
    return tensor
