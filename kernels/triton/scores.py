"""Triton: the attention mass that each key receives from some rows, from the rows' log-sum-exps.

Column sums of a softmax without its matrix: with the log-sum-exps given, a key's column needs nothing from other
columns. A program owns the keys of one tile and one key/value head and goes through the rows, so nothing is added
atomically, the sums are the same every time, and layers add up in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prophetkv_rag.kernels.row_blocks import RowBlocks
from prophetkv_rag.kernels.sparse_attention import soft_capped, visible_keys
from prophetkv_rag.kernels.tiles import (
    LOG_SUM_EXP,
    PROMPT_SIZES,
    SCORES,
    Tile,
    dot_precision,
    must_be_dense,
    num_splits,
    padded_head,
    tile_for,
)


@triton.jit(do_not_specialize=PROMPT_SIZES)
def query_scores_kernel(
    query_ptr,  # [H, m, D]
    key_ptr,  # [Hkv, n, D]
    rows_ptr,  # [m] int64, ascending
    lse_ptr,  # [H, m] fp32, natural; inf for a row that does not ask
    hidden_ptr,  # [n] uint8, or anything
    bounds_ptr,  # [2, key tiles] int64: first and last + 1 of the rows that see something of the tile
    mass_ptr,  # [Hkv, n] fp32; added to
    query_stride_head, query_stride_row,
    key_stride_head, key_stride_row,
    num_rows, num_keys,
    scaling, softcap, window,
    GROUPS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_HIDDEN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Program (tile of keys, key/value head)."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    key_index = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    channel = tl.arange(0, BLOCK_DIM)
    key_base = key_ptr + kv_head * key_stride_head + (tile * BLOCK_KEYS).to(tl.int64) * key_stride_row
    key = tl.load(
        key_base + tl.arange(0, BLOCK_KEYS)[:, None] * key_stride_row + channel[None, :],
        mask=(key_index < num_keys)[:, None] & (channel < DIM)[None, :],
        other=0.0,
    )
    begin = tl.load(bounds_ptr + tile).to(tl.int32) * GROUPS
    end = tl.load(bounds_ptr + tl.num_programs(0) + tile).to(tl.int32) * GROUPS
    total = tl.zeros((BLOCK_KEYS,), tl.float32)
    for first in range(begin, end, BLOCK_ROWS):
        packed = first + tl.arange(0, BLOCK_ROWS)
        valid = packed < end
        row = (packed // GROUPS).to(tl.int64)
        head = kv_head * GROUPS + packed % GROUPS
        position = tl.load(rows_ptr + row, mask=valid, other=-1).to(tl.int32)
        lse = tl.load(lse_ptr + head * num_rows + row, mask=valid, other=float("inf")) * 1.4426950408889634
        query = tl.load(  # [D, M]
            query_ptr + (head * query_stride_head + row * query_stride_row)[None, :] + channel[:, None],
            mask=valid[None, :] & (channel < DIM)[:, None],
            other=0.0,
        )
        logits = tl.dot(key, query, input_precision=PRECISION)
        if HAS_SOFTCAP:
            logits = soft_capped(logits * scaling, softcap) * 1.4426950408889634
        else:
            logits = logits * (scaling * 1.4426950408889634)
        visible = visible_keys(
            key_index[:, None], position[None, :], window, hidden_ptr, num_keys, HAS_WINDOW, HAS_HIDDEN
        )
        total += tl.sum(tl.where(visible, tl.exp2(logits - lse[None, :]), 0.0), 1)
    mass = mass_ptr + kv_head * num_keys + key_index
    before = tl.load(mass, mask=key_index < num_keys, other=0.0)
    tl.store(mass, before + total, mask=key_index < num_keys)


@triton.jit(do_not_specialize=PROMPT_SIZES)
def log_sum_exp_kernel(
    query_ptr,  # [H, m, D]
    key_ptr,  # [Hkv, n, D]
    rows_ptr,  # [m] int64, ascending
    hidden_ptr,  # [n] uint8, or anything
    lse_ptr,  # [splits, H, m] fp32
    query_stride_head, query_stride_row,
    key_stride_head, key_stride_row,
    num_rows, num_keys, keys_per_split,
    scaling, softcap, window,
    GROUPS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_HIDDEN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Program (tile of packed rows, key/value head, range of keys)."""
    tile = tl.program_id(0)
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
    query = tl.load(
        query_ptr + (head * query_stride_head + row * query_stride_row)[:, None] + channel[None, :],
        mask=valid[:, None] & (channel < DIM)[None, :],
        other=0.0,
    )
    start = split * keys_per_split
    stop = tl.minimum(tl.minimum(highest + 1, num_keys), start + keys_per_split)
    if HAS_WINDOW:
        start = tl.maximum(start, tl.maximum(lowest - window + 1, 0) // BLOCK_KEYS * BLOCK_KEYS)
    in_block = tl.arange(0, BLOCK_KEYS)
    key_offsets = channel[:, None] + in_block[None, :] * key_stride_row
    keys = key_ptr + kv_head * key_stride_head + start.to(tl.int64) * key_stride_row
    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(start, stop, BLOCK_KEYS):
        key = tl.load(keys + key_offsets, mask=(first + in_block < stop)[None, :] & (channel < DIM)[:, None], other=0.0)
        logits = tl.dot(query, key, input_precision=PRECISION)
        if HAS_SOFTCAP:
            logits = soft_capped(logits * scaling, softcap) * 1.4426950408889634
        else:
            logits = logits * (scaling * 1.4426950408889634)
        visible = visible_keys(
            (first + in_block)[None, :], position[:, None], window, hidden_ptr, stop, HAS_WINDOW, HAS_HIDDEN
        )
        logits = tl.where(visible, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        peak = higher
        keys += BLOCK_KEYS * key_stride_row
    heads = tl.num_programs(1) * GROUPS
    lse = (peak + tl.log2(mass)) * 0.6931471805599453
    tl.store(lse_ptr + (split * heads + head) * num_rows + row, lse, mask=valid)


def log_sum_exp(
    query: torch.Tensor,
    keys: torch.Tensor,
    blocks: RowBlocks,
    *,
    scaling: float,
    softcap: float | None = None,
    context: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """As `reference.log_sum_exp`; `tile` and `splits` override what the device suggests."""
    heads, num_rows, dim = query.shape
    kv_heads, num_keys, _ = keys.shape
    groups = heads // kv_heads
    tile = tile or tile_for(LOG_SUM_EXP, query, dim)
    num_tiles, key_blocks = triton.cdiv(num_rows * groups, tile.block_rows), triton.cdiv(num_keys, tile.block_keys)
    if splits is None:
        splits = num_splits(max(1, num_tiles * kv_heads), key_blocks, query.device)
    parts = query.new_empty(splits, heads, num_rows, dtype=torch.float32)
    if num_rows == 0:
        return parts[0]
    hidden = blocks.hidden_outside(context)
    must_be_dense(rows=blocks.rows, hidden_keys=hidden)
    log_sum_exp_kernel[(num_tiles, kv_heads, splits)](
        query, keys, blocks.rows,
        query if hidden is None else hidden.view(torch.uint8),
        parts,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1),
        num_rows, num_keys, triton.cdiv(key_blocks, splits) * tile.block_keys,
        float(scaling), float(softcap or 1.0), blocks.sliding_window or 0,
        GROUPS=groups, HAS_WINDOW=blocks.sliding_window is not None, HAS_HIDDEN=hidden is not None,
        HAS_SOFTCAP=softcap is not None, PRECISION=dot_precision(query.dtype),
        DIM=dim, BLOCK_DIM=padded_head(dim), BLOCK_ROWS=tile.block_rows, BLOCK_KEYS=tile.block_keys,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    lse = parts[0] if splits == 1 else torch.logsumexp(parts, dim=0)
    return lse if sinks is None else torch.logaddexp(lse, sinks.float()[:, None])


def add_query_scores(
    mass: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    blocks: RowBlocks,
    *,
    scaling: float,
    softcap: float | None = None,
    context: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """As `reference.add_query_scores`; `tile` overrides what the device suggests."""
    heads, num_rows, dim = query.shape
    kv_heads, num_keys, _ = keys.shape
    tile = tile or tile_for(SCORES, query, dim)
    num_tiles = triton.cdiv(num_keys, tile.block_keys)
    if num_rows == 0:
        return
    hidden = blocks.hidden_outside(context)
    must_be_dense(rows=blocks.rows, hidden_keys=hidden, lse=lse, mass=mass)
    if mass.shape != (kv_heads, num_keys):
        msg = f"mass is {list(mass.shape)}; it must be {[kv_heads, num_keys]}, a number for each key"
        raise ValueError(msg)
    query_scores_kernel[(num_tiles, kv_heads)](
        query, keys, blocks.rows, lse,
        query if hidden is None else hidden.view(torch.uint8),
        blocks.rows_of_tiles(num_keys, tile.block_keys), mass,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1),
        num_rows, num_keys,
        float(scaling), float(softcap or 1.0), blocks.sliding_window or 0,
        GROUPS=heads // kv_heads, HAS_WINDOW=blocks.sliding_window is not None, HAS_HIDDEN=hidden is not None,
        HAS_SOFTCAP=softcap is not None, PRECISION=dot_precision(query.dtype),
        DIM=dim, BLOCK_DIM=padded_head(dim), BLOCK_ROWS=tile.block_rows, BLOCK_KEYS=tile.block_keys,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
