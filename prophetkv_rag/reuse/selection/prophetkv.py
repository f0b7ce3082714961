"""ProphetKV: recompute the tokens that the question itself attends to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from prophetkv_rag.config import check_context_share, check_first_tokens
from prophetkv_rag.reuse.selection.base import QueryContext, Selection, Strategy, top_positions
from prophetkv_rag.reuse.selection.context_share import shared_context
from prophetkv_rag.reuse.selection.first_chunk import with_first_tokens


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
        first_tokens: How many tokens at the start of a first chunk that is not exact are selected whatever their score;
            `None` for `ProphetKVConfig.first_tokens`. Ours.
    """

    name: ClassVar[str] = "prophetkv"

    context_share: float | None = field(default=None, kw_only=True)
    first_tokens: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.context_share is not None:
            check_context_share(self.context_share)
        if self.first_tokens is not None:
            check_first_tokens(self.first_tokens)

    def select(self, context: QueryContext) -> Selection:
        """Select the `context.budget` eligible tokens of highest fused score."""
        if context.budget == 0 or context.budget >= int(context.eligible.sum()):
            return Selection(top_positions(context.eligible.float(), context.eligible, context.budget))
        scores = self.scores(context)
        ranked = with_first_tokens(scores, context, self._first_tokens(context))
        positions = top_positions(ranked, context.eligible, context.budget)
        share = context.config.context_share if self.context_share is None else self.context_share
        return Selection(positions, visible=shared_context(scores, positions, context.is_chunk, share))

    def _first_tokens(self, context: QueryContext) -> int:
        return context.config.first_tokens if self.first_tokens is None else self.first_tokens

    def scores(self, context: QueryContext) -> torch.Tensor:
        """Return the fused score of every token, `[N]` in fp32."""
        return context.attention_scores()
