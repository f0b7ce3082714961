"""Triton: the attention mass that each key receives from some rows, from the rows' log-sum-exps.

Column sums of a softmax without its matrix: with the log-sum-exps given, a key's column needs nothing from other
columns. A program owns the keys of one tile and one key/value head and goes through the rows, so nothing is added
atomically, the sums are the same every time, and layers add up in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prophetkv_rag.kernels.arguments import LogitInputs, Scoring
from prophetkv_rag.kernels.triton.attention import log_sum_exp, selected_rows_attention
from prophetkv_rag.kernels.triton.launch import logit_arguments, must_be_dense
from prophetkv_rag.kernels.triton.logits import first_keys, logits_for_exp2, packed_rows, visible_keys
from prophetkv_rag.kernels.triton.tiles import PROMPT_SIZES, SCORES, Tile, tile_for


@triton.jit(do_not_specialize=PROMPT_SIZES)
def scores_kernel(
    query_ptr,  # [H, m, D]
    key_ptr,  # [Hkv, n, D]
    last_ptr,  # [m] int64, ascending: the last key that each row sees
    first_ptr,  # [m] int64, ascending: the first, or anything
    lse_ptr,  # [H, m] fp32, natural; inf for a row that does not ask
    hidden_ptr,  # [n] uint8, or anything
    bounds_ptr,  # [2, key tiles] int64: first and last + 1 of the rows that see something of the tile
    mass_ptr,  # [Hkv, n] fp32; added to
    query_stride_head, query_stride_row,
    key_stride_head, key_stride_row,
    num_rows, num_keys,
    scaling, softcap,
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
        valid, row, head, last_key = packed_rows(first, end, kv_head, last_ptr, GROUPS, BLOCK_ROWS)
        first_key = first_keys(row, valid, last_key, first_ptr, HAS_WINDOW)
        lse = tl.load(lse_ptr + head * num_rows + row, mask=valid, other=float("inf")) * 1.4426950408889634
        query = tl.load(  # [D, M]
            query_ptr + (head * query_stride_head + row * query_stride_row)[None, :] + channel[:, None],
            mask=valid[None, :] & (channel < DIM)[:, None],
            other=0.0,
        )
        logits = logits_for_exp2(tl.dot(key, query, input_precision=PRECISION), scaling, softcap, HAS_SOFTCAP)
        visible = visible_keys(
            key_index[:, None], last_key[None, :], first_key[None, :], hidden_ptr, num_keys, HAS_WINDOW, HAS_HIDDEN
        )
        total += tl.sum(tl.where(visible, tl.exp2(logits - lse[None, :]), 0.0), 1)
    mass = mass_ptr + kv_head * num_keys + key_index
    before = tl.load(mass, mask=key_index < num_keys, other=0.0)
    tl.store(mass, before + total, mask=key_index < num_keys)


def add_query_scores(
    inputs: LogitInputs,
    mass: torch.Tensor,
    lse: torch.Tensor,
    context: torch.Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> None:
    """In one launch; `tile` overrides the device's."""
    tile = tile or tile_for(SCORES, inputs.query, inputs.dim)
    if inputs.num_rows == 0:
        return
    must_be_dense(lse=lse, mass=mass)
    if mass.shape != (inputs.kv_heads, inputs.num_keys):
        msg = f"mass is {list(mass.shape)}; it must be {[inputs.kv_heads, inputs.num_keys]}, a number for each key"
        raise ValueError(msg)
    scores_kernel[(triton.cdiv(inputs.num_keys, tile.block_keys), inputs.kv_heads)](
        **logit_arguments(inputs, inputs.blocks.hidden_outside(context), tile),
        lse_ptr=lse,
        bounds_ptr=inputs.blocks.rows_of_tiles(inputs.num_keys, tile.block_keys),
        mass_ptr=mass,
    )


def attend_and_score(
    inputs: LogitInputs, values: torch.Tensor, sinks: torch.Tensor | None, scoring: Scoring
) -> torch.Tensor:
    """In two or three launches: no `[H, m, n]` tensor, nothing waits for the device."""
    lse = inputs.query.new_empty(inputs.heads, inputs.num_rows, dtype=torch.float32)
    output = selected_rows_attention(inputs, values, sinks, None if scoring.context_softmax else lse)
    if scoring.context_softmax:
        lse = log_sum_exp(inputs, scoring.context)
    # A row that does not ask, or sees nothing of the context, has no say.
    lse.masked_fill_(lse.isneginf() | ~scoring.scoring_rows, float("inf"))
    add_query_scores(inputs, scoring.mass, lse, scoring.context)
    return output
