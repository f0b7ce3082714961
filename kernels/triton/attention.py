"""Triton: attention of scattered rows over the full cache, causal by position.

The heads of a group are packed with the rows (row-major), so that they share every key and value that is read. A
program owns one tile of packed rows: keys that all its rows see are read without a mask, those up to its last row's
position with one. Few rows over many keys are also cut by keys, and the parts joined by their log-sum-exps.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from prophetkv_rag.kernels.row_blocks import RowBlocks
from prophetkv_rag.kernels.tiles import (
    ATTENTION,
    PROMPT_SIZES,
    Tile,
    dot_precision,
    must_be_dense,
    num_splits,
    padded_head,
    tile_for,
)

LOG2_E = math.log2(math.e)


@triton.jit
def soft_capped(logits, softcap):
    """`softcap * tanh(logits / softcap)`; a series near 0, where 1 - 2 / (e^2x + 1) would lose digits."""
    x = logits / softcap
    square = x * x
    series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869488))))
    closed = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * x) + 1.0)
    return softcap * tl.where(square < 0.04, series, closed)


@triton.jit
def visible_keys(key, position, window, hidden_ptr, stop, HAS_WINDOW: tl.constexpr, HAS_HIDDEN: tl.constexpr):
    """Which of `key` (broadcast against `position`) a row may see; `key` is below `stop` in the cache."""
    visible = (key <= position) & (key < stop)
    if HAS_WINDOW:
        visible = visible & (key > position - window)
    if HAS_HIDDEN:
        hidden = tl.load(hidden_ptr + key, mask=key < stop, other=1)
        visible = visible & (hidden == 0)
    return visible


@triton.jit
def _attend_keys(
    total, peak, mass,  # [M, Dv], [M], [M]: running sum, largest logit, sum of weights
    query, position,  # [M, D], [M]
    key_ptr, value_ptr, hidden_ptr,
    key_stride, value_stride,
    start, stop,
    scaling, softcap, window,
    IS_MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_HIDDEN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_DIM)
    value_channel = tl.arange(0, BLOCK_VALUE)
    in_block = tl.arange(0, BLOCK_KEYS)
    key_offsets = channel[:, None] + in_block[None, :] * key_stride  # [D, N]
    value_offsets = in_block[:, None] * value_stride + value_channel[None, :]  # [N, Dv]
    # One 64-bit base that advances and 32-bit offsets in a tile: tensors of 64-bit addresses cost registers.
    keys = key_ptr + start.to(tl.int64) * key_stride
    values = value_ptr + start.to(tl.int64) * value_stride
    for first in range(start, stop, BLOCK_KEYS):
        if IS_MASKED:
            in_range = first + in_block < stop
            key_mask = in_range[None, :] & (channel < DIM)[:, None]
            value_mask = in_range[:, None] & (value_channel < VALUE_DIM)[None, :]
            key = tl.load(keys + key_offsets, mask=key_mask, other=0.0)
        elif BLOCK_DIM != DIM:
            key = tl.load(keys + key_offsets, mask=(channel < DIM)[:, None], other=0.0)
        else:
            key = tl.load(keys + key_offsets)
        logits = tl.dot(query, key, input_precision=PRECISION)
        if HAS_SOFTCAP:
            logits = soft_capped(logits * scaling, softcap) * 1.4426950408889634
        else:
            logits = logits * (scaling * 1.4426950408889634)
        if IS_MASKED:
            visible = visible_keys(
                (first + in_block)[None, :], position[:, None], window, hidden_ptr, stop, HAS_WINDOW, HAS_HIDDEN
            )
            logits = tl.where(visible, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        if IS_MASKED:  # a row that has seen nothing yet has no finite peak
            base = tl.where(higher == float("-inf"), 0.0, higher)
        else:
            base = higher
        weights = tl.exp2(logits - base[:, None])
        rescale = tl.exp2(peak - base)
        mass = mass * rescale + tl.sum(weights, 1)
        if IS_MASKED:
            value = tl.load(values + value_offsets, mask=value_mask, other=0.0)
        elif BLOCK_VALUE != VALUE_DIM:
            value = tl.load(values + value_offsets, mask=(value_channel < VALUE_DIM)[None, :], other=0.0)
        else:
            value = tl.load(values + value_offsets)
        total = tl.dot(weights.to(value.dtype), value, total * rescale[:, None], input_precision=PRECISION)
        peak = higher
        keys += BLOCK_KEYS * key_stride
        values += BLOCK_KEYS * value_stride
    return total, peak, mass


@triton.jit(do_not_specialize=PROMPT_SIZES)
def sparse_attention_kernel(
    query_ptr,  # [H, m, D]
    key_ptr,  # [Hkv, n, D]
    value_ptr,  # [Hkv, n, Dv]
    rows_ptr,  # [m] int64, ascending
    hidden_ptr,  # [n] uint8, or anything
    sinks_ptr,  # [H], or anything
    out_ptr,  # [splits, m, H, Dv]
    lse_ptr,  # [splits, H, m] fp32
    query_stride_head, query_stride_row,
    key_stride_head, key_stride_row,
    value_stride_head, value_stride_row,
    out_stride_split, out_stride_row, out_stride_head,
    num_rows, num_keys, keys_per_split,
    scaling, softcap, window,
    GROUPS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_HIDDEN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Program (tile of packed rows, the last and longest first; key/value head; range of keys)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    packed = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    num_packed = num_rows * GROUPS
    valid = packed < num_packed
    row = (packed // GROUPS).to(tl.int64)
    head = kv_head * GROUPS + packed % GROUPS
    position = tl.load(rows_ptr + row, mask=valid, other=0).to(tl.int32)
    lowest = tl.load(rows_ptr + tile * BLOCK_ROWS // GROUPS).to(tl.int32)
    highest = tl.load(rows_ptr + (tl.minimum((tile + 1) * BLOCK_ROWS, num_packed) - 1) // GROUPS).to(tl.int32)

    channel = tl.arange(0, BLOCK_DIM)
    query_mask = valid[:, None] & (channel < DIM)[None, :]
    query_offsets = (head * query_stride_head + row * query_stride_row)[:, None] + channel[None, :]
    query = tl.load(query_ptr + query_offsets, mask=query_mask, other=0.0)

    start = split * keys_per_split
    stop = tl.minimum(tl.minimum(highest + 1, num_keys), start + keys_per_split)
    if HAS_WINDOW:
        start = tl.maximum(start, tl.maximum(lowest - window + 1, 0) // BLOCK_KEYS * BLOCK_KEYS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_VALUE), tl.float32)
    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    keys, values = key_ptr + kv_head * key_stride_head, value_ptr + kv_head * value_stride_head
    plain_stop = start
    if not HAS_WINDOW and not HAS_HIDDEN:
        plain_stop = tl.maximum(
            start, tl.minimum((lowest + 1) // BLOCK_KEYS * BLOCK_KEYS, stop // BLOCK_KEYS * BLOCK_KEYS)
        )
        total, peak, mass = _attend_keys(
            total, peak, mass, query, position, keys, values, hidden_ptr, key_stride_row, value_stride_row,
            start, plain_stop, scaling, softcap, window,
            False, HAS_WINDOW, HAS_HIDDEN, HAS_SOFTCAP, PRECISION,
            DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, BLOCK_KEYS,
        )  # fmt: skip
    total, peak, mass = _attend_keys(
        total, peak, mass, query, position, keys, values, hidden_ptr, key_stride_row, value_stride_row,
        plain_stop, stop, scaling, softcap, window,
        True, HAS_WINDOW, HAS_HIDDEN, HAS_SOFTCAP, PRECISION,
        DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, BLOCK_KEYS,
    )  # fmt: skip
    if HAS_SINKS:  # a logit that takes weight and gives no value
        sink = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
        sink = tl.where(split == 0, sink, float("-inf"))
        higher = tl.maximum(peak, sink)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        rescale = tl.exp2(peak - base)
        mass = mass * rescale + tl.exp2(sink - base)
        total = total * rescale[:, None]
        peak = higher
    value_channel = tl.arange(0, BLOCK_VALUE)
    out_offsets = (split.to(tl.int64) * out_stride_split + row * out_stride_row + head * out_stride_head)[:, None]
    attended = total / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(
        out_ptr + out_offsets + value_channel[None, :],
        attended.to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (value_channel < VALUE_DIM)[None, :],
    )
    if HAS_LSE:
        lse = (peak + tl.log2(mass)) * 0.6931471805599453
        heads = tl.num_programs(1) * GROUPS
        tl.store(lse_ptr + (split * heads + head) * num_rows + row, lse, mask=valid)


def selected_rows_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: RowBlocks,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """As `reference.selected_rows_attention`; `tile` and `splits` (ranges of keys) override the device's."""
    heads, num_rows, dim = query.shape
    kv_heads, num_keys, value_dim = values.shape
    groups = heads // kv_heads
    tile = tile or tile_for(ATTENTION, query, max(dim, value_dim))
    num_tiles = triton.cdiv(num_rows * groups, tile.block_rows)
    key_blocks = triton.cdiv(num_keys, tile.block_keys)
    if splits is None:
        splits = num_splits(max(1, num_tiles * kv_heads), key_blocks, query.device)
    output = query.new_empty(num_rows, heads, value_dim)
    parts = output[None] if splits == 1 else query.new_empty((splits, *output.shape), dtype=torch.float32)
    wants_lse = lse is not None or splits > 1
    lse_parts = lse[None] if lse is not None and splits == 1 else query.new_empty(
        (splits, heads, num_rows) if wants_lse else (1, 1, 1), dtype=torch.float32
    )  # fmt: skip
    if num_rows == 0:
        return output
    hidden = blocks.hidden_keys
    must_be_dense(rows=blocks.rows, hidden_keys=hidden, sinks=sinks, lse=lse)
    sparse_attention_kernel[(num_tiles, kv_heads, splits)](
        query, keys, values, blocks.rows,
        query if hidden is None else hidden.view(torch.uint8),
        query if sinks is None else sinks,
        parts, lse_parts,
        query.stride(0), query.stride(1),
        keys.stride(0), keys.stride(1),
        values.stride(0), values.stride(1),
        parts.stride(0), parts.stride(1), parts.stride(2),
        num_rows, num_keys, triton.cdiv(key_blocks, splits) * tile.block_keys,
        float(scaling), float(softcap or 1.0), blocks.sliding_window or 0,
        GROUPS=groups, HAS_WINDOW=blocks.sliding_window is not None, HAS_HIDDEN=hidden is not None,
        HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None, HAS_LSE=wants_lse,
        PRECISION=dot_precision(query.dtype),
        DIM=dim, VALUE_DIM=value_dim, BLOCK_DIM=padded_head(dim), BLOCK_VALUE=padded_head(value_dim),
        BLOCK_ROWS=tile.block_rows, BLOCK_KEYS=tile.block_keys,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        whole = torch.logsumexp(lse_parts, dim=0)
        # Of a row that sees nothing every part is 0, with a log-sum-exp of -inf.
        share = (lse_parts - whole.clamp_min(-1e38)).exp().transpose(1, 2)[..., None]  # [splits, m, H, 1]
        output.copy_((parts * share).sum(0))
        if lse is not None:
            lse.copy_(whole)
    return output
