"""What recomputed tokens see of the other chunk tokens: a few before each, and those that the question attends to."""

from __future__ import annotations

import torch

from prophetkv_rag.reuse.selection.base import token_budget

NEIGHBOURS = 4
"""Tokens before each recomputed one that come first. Without them the same number of keys is less close to full
prefill; its whole chunk is no closer, and 32 leave too little room for what scores well (docs/quality.md)."""


def shared_context(
    scores: torch.Tensor, recomputed: torch.Tensor, is_chunk: torch.Tensor, share: float
) -> torch.Tensor | None:
    """Return the positions that recomputed tokens see beside each other and the tokens outside chunks, ascending.

    Args:
        scores: `[N]` of stage I.
        recomputed: `[k]`, positions.
        is_chunk: `[N]`, bool.
        share: How many of the other chunk tokens, in [0, 1], rounded down. First those at most `NEIGHBOURS` before a
            recomputed one, the nearest first, then all others; by score among equals, ties go to the lower position.

    Returns:
        `None` for all of them.
    """
    if share == 1:
        return None
    distance = torch.full(scores.shape, NEIGHBOURS + 1, dtype=torch.int64, device=scores.device)
    for step in range(NEIGHBOURS, 0, -1):
        distance[recomputed[recomputed >= step] - step] = step
    is_other = is_chunk.clone()
    is_other[recomputed] = False
    others = is_other.nonzero()[:, 0]
    by_score = others[torch.sort(scores[others], descending=True, stable=True).indices]
    in_order = by_score[torch.sort(distance[by_score], stable=True).indices]
    return in_order[: token_budget(share, others.shape[0])].sort().values
