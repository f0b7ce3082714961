"""ProphetKV: recompute the tokens that the question itself attends to."""

from __future__ import annotations

from typing import ClassVar

import torch

from prophetkv_rag.reuse.selection.base import QueryContext, Selection, Strategy, top_positions


class ProphetKV(Strategy):
    """Query-driven selection of arXiv 2602.02579, Algorithm 1.

    Stage I lets the question's tokens attend to the stale caches in every layer; a context token's score is its
    attention mass (softmax weights, averaged over heads and asking tokens), summed over the layers (Eq. 7, whose 1/L
    does not change the ranking). The top floor(p * C) tokens are selected once, for all layers.

    What the paper leaves open is set in `ProphetKVConfig` (`score_softmax`, `query_scope`, `first_chunk_eligible`).
    """

    name: ClassVar[str] = "prophetkv"

    def select(self, context: QueryContext) -> Selection:
        """Select the `context.budget` eligible tokens of highest fused score."""
        if context.budget == 0 or context.budget >= int(context.eligible.sum()):
            return Selection(top_positions(context.eligible.float(), context.eligible, context.budget))
        return Selection(top_positions(self.scores(context), context.eligible, context.budget))

    def scores(self, context: QueryContext) -> torch.Tensor:
        """Return the fused score of every token, `[N]` in fp32."""
        return context.attention_scores()
