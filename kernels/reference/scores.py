"""PyTorch implementations of scoring in two steps: log-sum-exps of rows, then what each key receives."""

from __future__ import annotations

import torch

from prophetkv_rag.kernels.row_blocks import RowBlock, RowBlocks


def _masked_logits(
    query: torch.Tensor,
    keys: torch.Tensor,
    block: RowBlock,
    scaling: float,
    softcap: float | None,
    context: torch.Tensor | None,
) -> torch.Tensor:
    """`[Hkv, G * rows, keys of the block]` in fp32, -inf for what a row may not see."""
    packed = query[:, block.rows].reshape(keys.shape[0], -1, query.shape[-1]).float()
    logits = torch.matmul(packed, keys[:, block.keys].float().transpose(1, 2)).mul_(scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits[..., logits.shape[-1] - block.mask.shape[-1] :] += block.mask
    if context is not None:
        logits.masked_fill_(~context[block.keys], float("-inf"))
    return logits


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
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    for block in blocks:
        logits = _masked_logits(query, keys, block, scaling, softcap, context)
        lse[:, block.rows] = torch.logsumexp(logits, dim=-1).reshape(query.shape[0], -1)
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
    for block in blocks:
        logits = _masked_logits(query, keys, block, scaling, softcap, context)
        of_rows = lse[:, block.rows].reshape(keys.shape[0], -1, 1)
        mass[:, block.keys] += torch.exp(logits - of_rows).sum(1)
