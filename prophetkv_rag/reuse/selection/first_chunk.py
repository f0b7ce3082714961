"""The start of a prompt's first chunk, whose rows are off where more stood before it than stands there now."""

from __future__ import annotations

import torch

from prophetkv_rag.reuse.stage_one import QueryContext


def with_first_tokens(scores: torch.Tensor, context: QueryContext, count: int) -> torch.Tensor:
    """Return the scores with those of the first chunk's first tokens above all others.

    Args:
        scores: `[N]`, of any tokens.
        context: The query. A first chunk that is exact is left as it is.
        count: How many tokens, at most half of the budget.
    """
    if count == 0 or context.layout.exact_first_chunk or not context.layout.chunks:
        return scores
    first = context.layout.chunks[0]
    stop = min(first.stop, first.start + min(count, context.budget // 2))
    raised = scores.clone()
    raised[first.start : stop] = torch.inf
    return raised
