"""ProphetKV: recompute the tokens that the question itself attends to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from prophetkv_rag.config import check_context_share
from prophetkv_rag.reuse.selection.base import QueryContext, Selection, Strategy, top_positions
from prophetkv_rag.reuse.selection.context_share import shared_context


@dataclass(frozen=True, slots=True)
class ProphetKV(Strategy):
    """Query-driven selection of arXiv 2602.02579, Algorithm 1.

    Stage I lets the question's tokens attend to the stale caches in every layer; a context token's score is its
    attention mass (softmax weights, averaged over heads and asking tokens), summed over the layers (Eq. 7, whose 1/L
    does not change the ranking). The top floor(p * C) tokens are selected once, for all layers.

    What the paper leaves open is set in `ProphetKVConfig` (`score_softmax`, `query_scope`, `first_chunk_eligible`).

    Attributes:
        context_share: What the selected tokens see, beside what is selected or outside the chunks: a share of all other
            chunk tokens, in [0, 1], as `shared_context` chooses it (the idea of RelaxKV, arXiv 2609.33503, whose rule
            may be another); `None` for `ProphetKVConfig.context_share`.
    """

    name: ClassVar[str] = "prophetkv"

    context_share: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.context_share is not None:
            check_context_share(self.context_share)

    def select(self, context: QueryContext) -> Selection:
        """Select the `context.budget` eligible tokens of highest fused score."""
        if context.budget == 0 or context.budget >= int(context.eligible.sum()):
            return Selection(top_positions(context.eligible.float(), context.eligible, context.budget))
        scores = self.scores(context)
        positions = top_positions(scores, context.eligible, context.budget)
        share = context.config.context_share if self.context_share is None else self.context_share
        return Selection(positions, visible=shared_context(scores, positions, context.is_chunk, share))

    def scores(self, context: QueryContext) -> torch.Tensor:
        """Return the fused score of every token, `[N]` in fp32."""
        return context.attention_scores()
