"""Triton: attention of scattered rows over the full cache, causal by position; without values, its log-sum-exps.

Which keys a row sees comes as the indices of the first and the last, so keys that were gathered are read no otherwise.

The heads of a group are packed with the rows (row-major), so that they share every key and value that is read. A
program owns one tile of packed rows: keys that all its rows see are read without a mask, those up to its last row's
position with one. Few rows over many keys are also cut by keys, and the parts joined by their log-sum-exps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prophetkv_rag.kernels.arguments import LogitInputs
from prophetkv_rag.kernels.triton.launch import logit_arguments, must_be_dense
from prophetkv_rag.kernels.triton.logits import first_keys, logits_for_exp2, packed_rows, visible_keys
from prophetkv_rag.kernels.triton.tiles import (
    ATTENTION,
    LOG_SUM_EXP,
    PROMPT_SIZES,
    Tile,
    num_splits,
    padded_head,
    tile_for,
)


@triton.jit
def _load(tile, in_range, in_head, IS_MASKED: tl.constexpr, IS_FULL: tl.constexpr):
    """Load a tile of keys or values: of those in range if some may not be, of the head's channels if not all are."""
    if IS_MASKED:
        return tl.load(tile, mask=in_range & in_head, other=0.0)
    elif not IS_FULL:
        return tl.load(tile, mask=in_head, other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def _attend_keys(
    total, peak, mass,  # [M, Dv], [M], [M]: running sum, largest logit, sum of weights
    query, last_key, first_key,  # [M, D], [M], [M]: the keys that each row sees lie between
    key_ptr, value_ptr, hidden_ptr,
    key_stride, value_stride,
    start, stop,
    scaling, softcap,
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
        in_range = first + in_block < stop
        key = _load(keys + key_offsets, in_range[None, :], (channel < DIM)[:, None], IS_MASKED, BLOCK_DIM == DIM)
        logits = logits_for_exp2(tl.dot(query, key, input_precision=PRECISION), scaling, softcap, HAS_SOFTCAP)
        if IS_MASKED:
            visible = visible_keys(
                (first + in_block)[None, :], last_key[:, None], first_key[:, None], hidden_ptr, stop,
                HAS_WINDOW, HAS_HIDDEN,
            )  # fmt: skip
            logits = tl.where(visible, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        if IS_MASKED:  # a row that has seen nothing yet has no finite peak
            base = tl.where(higher == float("-inf"), 0.0, higher)
        else:
            base = higher
        weights = tl.exp2(logits - base[:, None])
        rescale = tl.exp2(peak - base)
        mass = mass * rescale + tl.sum(weights, 1)
        if VALUE_DIM > 0:
            in_head = (value_channel < VALUE_DIM)[None, :]
            value = _load(values + value_offsets, in_range[:, None], in_head, IS_MASKED, BLOCK_VALUE == VALUE_DIM)
            total = tl.dot(weights.to(value.dtype), value, total * rescale[:, None], input_precision=PRECISION)
        peak = higher
        keys += BLOCK_KEYS * key_stride
        values += BLOCK_KEYS * value_stride
    return total, peak, mass


@triton.jit(do_not_specialize=PROMPT_SIZES)
def attention_kernel(
    query_ptr,  # [H, m, D]
    key_ptr,  # [Hkv, n, D]
    value_ptr,  # [Hkv, n, Dv], or anything
    last_ptr,  # [m] int64, ascending: the last key that each row sees
    first_ptr,  # [m] int64, ascending: the first, or anything
    hidden_ptr,  # [n] uint8, or anything
    sinks_ptr,  # [H], or anything
    out_ptr,  # [splits, m, H, Dv], or anything
    lse_ptr,  # [splits, H, m] fp32, or anything
    query_stride_head, query_stride_row,
    key_stride_head, key_stride_row,
    value_stride_head, value_stride_row,
    out_stride_split, out_stride_row, out_stride_head,
    num_rows, num_keys, keys_per_split,
    scaling, softcap,
    GROUPS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_HIDDEN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,  # 0: no values and no output, log-sum-exps only
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Program (tile of packed rows, the last and longest first; key/value head; range of keys)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_packed = num_rows * GROUPS
    valid, row, head, last_key = packed_rows(tile * BLOCK_ROWS, num_packed, kv_head, last_ptr, GROUPS, BLOCK_ROWS)
    first_key = first_keys(row, valid, last_key, first_ptr, HAS_WINDOW)
    lowest = tl.load(last_ptr + tile * BLOCK_ROWS // GROUPS).to(tl.int32)
    highest = tl.load(last_ptr + (tl.minimum((tile + 1) * BLOCK_ROWS, num_packed) - 1) // GROUPS).to(tl.int32)

    channel = tl.arange(0, BLOCK_DIM)
    query_mask = valid[:, None] & (channel < DIM)[None, :]
    query_offsets = (head * query_stride_head + row * query_stride_row)[:, None] + channel[None, :]
    query = tl.load(query_ptr + query_offsets, mask=query_mask, other=0.0)

    start = split * keys_per_split
    stop = tl.minimum(tl.minimum(highest + 1, num_keys), start + keys_per_split)
    if HAS_WINDOW:
        seen_from = tl.load(first_ptr + tile * BLOCK_ROWS // GROUPS).to(tl.int32)
        start = tl.maximum(start, seen_from // BLOCK_KEYS * BLOCK_KEYS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_VALUE), tl.float32)
    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    keys, values = key_ptr + kv_head * key_stride_head, value_ptr + kv_head * value_stride_head
    # Keys that every row sees, then the others; hidden ones may be anywhere, and a window may end anywhere. Without
    # values the second loop spilled registers, and a context, which is what log-sum-exps are over, hides keys anyway.
    HAS_PLAIN: tl.constexpr = VALUE_DIM > 0 and (not HAS_WINDOW and not HAS_HIDDEN)
    plain_stop = start
    if HAS_PLAIN:
        plain_stop = tl.maximum(
            start, tl.minimum((lowest + 1) // BLOCK_KEYS * BLOCK_KEYS, stop // BLOCK_KEYS * BLOCK_KEYS)
        )
    for IS_MASKED in tl.static_range(2):
        if IS_MASKED or HAS_PLAIN:
            total, peak, mass = _attend_keys(
                total, peak, mass, query, last_key, first_key, keys, values, hidden_ptr, key_stride_row,
                value_stride_row, plain_stop if IS_MASKED else start, stop if IS_MASKED else plain_stop,
                scaling, softcap, IS_MASKED, HAS_WINDOW, HAS_HIDDEN, HAS_SOFTCAP, PRECISION,
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
    if VALUE_DIM > 0:
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
    inputs: LogitInputs,
    values: torch.Tensor,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """In one launch; `tile` and `splits` (ranges of keys) override the device's."""
    tile = tile or tile_for(ATTENTION, inputs.query, max(inputs.dim, values.shape[-1]))
    splits = splits or _splits(inputs, tile)
    output = inputs.query.new_empty(inputs.num_rows, inputs.heads, values.shape[-1])
    if inputs.num_rows == 0:
        return output
    must_be_dense(sinks=sinks, lse=lse)
    hidden = inputs.blocks.hidden_keys
    if splits == 1:
        _launch(inputs, hidden, tile, splits, None if lse is None else lse[None], values, sinks, output[None])
        return output
    parts = output.new_empty((splits, *output.shape), dtype=torch.float32)
    lse_parts = output.new_empty((splits, inputs.heads, inputs.num_rows), dtype=torch.float32)
    _launch(inputs, hidden, tile, splits, lse_parts, values, sinks, parts)
    whole = torch.logsumexp(lse_parts, dim=0)
    # Of a row that sees nothing every part is 0, with a log-sum-exp of -inf.
    share = (lse_parts - whole.clamp_min(-1e38)).exp().transpose(1, 2)[..., None]  # [splits, m, H, 1]
    output.copy_((parts * share).sum(0))
    if lse is not None:
        lse.copy_(whole)
    return output


def log_sum_exp(
    inputs: LogitInputs,
    context: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """In one launch; `tile` and `splits` (ranges of keys) override the device's."""
    tile = tile or tile_for(LOG_SUM_EXP, inputs.query, inputs.dim)
    splits = splits or _splits(inputs, tile)
    parts = inputs.query.new_empty(splits, inputs.heads, inputs.num_rows, dtype=torch.float32)
    if inputs.num_rows == 0:
        return parts[0]
    _launch(inputs, inputs.blocks.hidden_outside(context), tile, splits, parts)
    lse = parts[0] if splits == 1 else torch.logsumexp(parts, dim=0)
    return lse if sinks is None else torch.logaddexp(lse, sinks.float()[:, None])


def _grid(inputs: LogitInputs, tile: Tile) -> tuple[int, int]:
    """Tiles of packed rows, and key/value heads."""
    return triton.cdiv(inputs.num_rows * (inputs.heads // inputs.kv_heads), tile.block_rows), inputs.kv_heads


def _splits(inputs: LogitInputs, tile: Tile) -> int:
    num_tiles, kv_heads = _grid(inputs, tile)
    key_blocks = triton.cdiv(inputs.num_keys, tile.block_keys)
    return num_splits(max(1, num_tiles * kv_heads), key_blocks, inputs.query.device)


def _launch(
    inputs: LogitInputs,
    hidden: torch.Tensor | None,
    tile: Tile,
    splits: int,
    lse_parts: torch.Tensor | None,
    values: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    parts: torch.Tensor | None = None,
) -> None:
    """Fill `lse_parts [splits, H, m]` and `parts [splits, m, H, Dv]`; what is `None` is neither read nor written."""
    anything, value_dim = inputs.query, 0 if values is None else values.shape[-1]
    values = anything if values is None else values
    parts = anything[None] if parts is None else parts
    attention_kernel[(*_grid(inputs, tile), splits)](
        **logit_arguments(inputs, hidden, tile),
        value_ptr=values,
        sinks_ptr=anything if sinks is None else sinks,
        out_ptr=parts,
        lse_ptr=anything if lse_parts is None else lse_parts,
        value_stride_head=values.stride(0),
        value_stride_row=values.stride(1),
        out_stride_split=parts.stride(0),
        out_stride_row=parts.stride(1),
        out_stride_head=parts.stride(2),
        keys_per_split=triton.cdiv(triton.cdiv(inputs.num_keys, tile.block_keys), splits) * tile.block_keys,
        HAS_SINKS=sinks is not None,
        HAS_LSE=lse_parts is not None,
        VALUE_DIM=value_dim,
        BLOCK_VALUE=padded_head(value_dim),
    )
