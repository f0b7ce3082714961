"""The tensor operations of the reuse path: what each takes and gives.

Every operation has a PyTorch implementation (`reference/`), which is also the CPU path, and a Triton kernel
(`triton/`), which runs whenever the tensors are on a CUDA or ROCm device. Both have the operation's name and take the
same arguments, tied up as in `arguments.py`; `switch.py` picks. `PROPHETKV_KERNELS=reference` (or `triton`, or `auto`)
and `force` override that, for debugging.

Shapes: H query heads, Hkv key/value heads, m computed rows, n keys, D head dim (Dv of values).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prophetkv_rag.kernels import reference, switch
from prophetkv_rag.kernels.arguments import Angles, LogitInputs, Scoring, States
from prophetkv_rag.kernels.row_blocks import RowBlocks
from prophetkv_rag.kernels.row_source import RowSource
from prophetkv_rag.kernels.switch import CHOICES, VARIABLE, force, in_use

__all__ = [
    "CHOICES",
    "VARIABLE",
    "RowBlocks",
    "RowSource",
    "add_query_scores",
    "attend_and_score",
    "force",
    "in_use",
    "log_sum_exp",
    "rope_gather",
    "rope_scatter",
    "rotate",
    "selected_rows_attention",
]


def rotate(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply a rotary embedding to un-rotated states.

    Args:
        states: `[..., n, D]`; fp16, bf16 or fp32.
        cos: `[n, r]` with 2r <= D, fp32; channels beyond 2r pass through.
        sin: `[n, r]`, fp32.
        interleaved: Pairs are (2i, 2i + 1) rather than (i, i + r).
        out: Where to write, of the shape of `states` and any dtype; not `states` itself.

    Returns:
        `out`, or a new tensor of the shape and dtype of `states`; the rotation is done in fp32.
    """
    return switch.run(reference.rotate, (states,), states, Angles(cos, sin, interleaved), out)


def _angles(cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool) -> Angles | None:
    return None if cos is None or sin is None else Angles(cos, sin, interleaved)


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
    caches, angles = (key_out, value_out), _angles(cos, sin, interleaved)
    arguments = (States(*caches), sources, starts, angles)
    unknown = next((source.unknown_dtype for source in sources if source.unknown_dtype is not None), None)
    if unknown is None:
        switch.run(reference.rope_gather, caches, *arguments)
        return
    if switch.kernels_for(caches) is not None:
        switch.say_once(f"chunks are stored as {unknown}")
    reference.rope_gather(*arguments)


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
    tensors, angles = (key, value, key_out, value_out), _angles(cos, sin, interleaved)
    fresh, out = States(key, value, query), States(key_out, value_out)
    return switch.run(reference.rope_scatter, tensors, fresh, rows, out, angles)


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
) -> torch.Tensor:
    """Attention of scattered rows over the full cache, or keys gathered from it, causal by position.

    Args:
        query: `[H, m, D]`, rotated, in the order of `blocks.rows`.
        keys: `[Hkv, n, D]`, rotated; key i stands at position i, or where the blocks' key positions say.
        values: `[Hkv, n, Dv]`.
        blocks: The rows' positions, the keys', window and hidden keys.
        scaling: Factor on the logits.
        softcap: Gemma 2's logit soft-capping, or `None`.
        sinks: `[H]`, gpt-oss's learned sink logits, or `None`.
        lse: `[H, m]`, fp32: filled with the natural log-sum-exp of what each row sees, sinks included; or `None`.

    Returns:
        `[m, H, Dv]` in the dtype of `query`.
    """
    inputs = LogitInputs(query, keys, blocks, scaling, softcap)
    return switch.run(reference.selected_rows_attention, (query, keys, values), inputs, values, sinks, lse)


def attend_and_score(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: RowBlocks,
    *,
    mass: torch.Tensor,
    context: torch.Tensor,
    scoring_rows: torch.Tensor,
    context_softmax: bool,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention as `selected_rows_attention`, adding up the attention mass that each context key receives.

    Args:
        query: As there, like all that is not named here.
        keys: Alike.
        values: Alike.
        blocks: Alike.
        mass: `[Hkv, n]`, fp32: added to, so that layers may share it: the weights that a key/value head's queries of
            the scoring rows give each context key, summed; other keys' stay as they are.
        context: `[n]`, bool: the keys to score.
        scoring_rows: `[m]`, bool: the rows that ask.
        context_softmax: Whether each row's weights are normalised over the visible context keys only, or are the
            attention really paid (over everything the row sees, sinks included).
        scaling: As there.
        softcap: Alike.
        sinks: Alike.

    Returns:
        `[m, H, Dv]` in the dtype of `query`.
    """
    inputs = LogitInputs(query, keys, blocks, scaling, softcap)
    scoring = Scoring(mass, context, scoring_rows, context_softmax)
    return switch.run(reference.attend_and_score, (query, keys, values), inputs, values, sinks, scoring)


def log_sum_exp(
    query: torch.Tensor,
    keys: torch.Tensor,
    blocks: RowBlocks,
    *,
    scaling: float,
    softcap: float | None = None,
    context: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Natural logarithm of the softmax's denominator, per head and row.

    Args:
        query: `[H, m, D]`.
        keys: `[Hkv, n, D]`.
        blocks: The rows' positions, window and hidden keys.
        scaling: Factor on the logits.
        softcap: Logit soft-capping, or `None`.
        context: `[n]`, bool: keys that count; `None` for all.
        sinks: `[H]` sink logits, or `None`.

    Returns:
        `[H, m]`, fp32; -inf for a row that sees no key that counts.
    """
    return switch.run(
        reference.log_sum_exp, (query, keys), LogitInputs(query, keys, blocks, scaling, softcap), context, sinks
    )


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
) -> None:
    """Add `exp(logit - lse)`, summed over rows and a group's heads, to each key's mass.

    Args:
        mass: `[Hkv, n]`, fp32; added to, so that layers may share it.
        query: `[H, m, D]`.
        keys: `[Hkv, n, D]`.
        lse: `[H, m]`, fp32; inf for a row that does not ask.
        blocks: The rows' positions, window and hidden keys.
        scaling: Factor on the logits.
        softcap: Logit soft-capping, or `None`.
        context: `[n]`, bool: keys to score; `None` for all.
    """
    inputs = LogitInputs(query, keys, blocks, scaling, softcap)
    switch.run(reference.add_query_scores, (query, keys), inputs, mass, lse, context)
