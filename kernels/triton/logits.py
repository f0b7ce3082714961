"""Triton: what the kernels over logits share: which rows a program has, what they see, logits of their products."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def packed_rows(first, stop, kv_head, last_ptr, GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Of the packed rows from `first`, row-major with a group's heads inside: which exist, row, head and last key seen.

    The last key of one that does not exist is -1: it sees nothing.
    """
    packed = first + tl.arange(0, BLOCK_ROWS)
    valid = packed < stop
    row = (packed // GROUPS).to(tl.int64)
    head = kv_head * GROUPS + packed % GROUPS
    last_key = tl.load(last_ptr + row, mask=valid, other=-1).to(tl.int32)
    return valid, row, head, last_key


@triton.jit
def first_keys(row, valid, last_key, first_ptr, HAS_WINDOW: tl.constexpr):
    """The first key that each row's sliding window holds; something that is not used where there is no window."""
    if HAS_WINDOW:
        return tl.load(first_ptr + row, mask=valid, other=0).to(tl.int32)
    else:
        return last_key


@triton.jit
def visible_keys(key, last_key, first_key, hidden_ptr, stop, HAS_WINDOW: tl.constexpr, HAS_HIDDEN: tl.constexpr):
    """Which of `key` (broadcast against `last_key`) a row may see; `key` is below `stop` in the cache."""
    visible = (key <= last_key) & (key < stop)
    if HAS_WINDOW:
        visible = visible & (key >= first_key)
    if HAS_HIDDEN:
        hidden = tl.load(hidden_ptr + key, mask=key < stop, other=1)
        visible = visible & (hidden == 0)
    return visible


@triton.jit
def _soft_capped(logits, softcap):
    """`softcap * tanh(logits / softcap)`; a series near 0, where 1 - 2 / (e^2x + 1) would lose digits."""
    x = logits / softcap
    square = x * x
    series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869488))))
    closed = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * x) + 1.0)
    return softcap * tl.where(square < 0.04, series, closed)


@triton.jit
def logits_for_exp2(products, scaling, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits of `query @ key`, over ln 2: `exp2` is the instruction that there is."""
    if HAS_SOFTCAP:
        return _soft_capped(products * scaling, softcap) * 1.4426950408889634
    else:
        return products * (scaling * 1.4426950408889634)
