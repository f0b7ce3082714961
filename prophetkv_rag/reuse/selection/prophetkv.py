"""ProphetKV: recompute the tokens that the question itself attends to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from prophetkv_rag.config import FirstChunk, ProphetKVConfig, check_context_share, check_first_chunk
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
        first_chunk: See `ProphetKVConfig.first_chunk`, which `None` is for; where it is exact, the budget is for the
            other chunks. Ours.
    """

    name: ClassVar[str] = "prophetkv"

    context_share: float | None = field(default=None, kw_only=True)
    first_chunk: FirstChunk | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.context_share is not None:
            check_context_share(self.context_share)
        if self.first_chunk is not None:
            check_first_chunk(self.first_chunk)

    @property
    def shares_passes(self) -> bool:
        """See `Strategy`: of this class alone, not of those that change how it scores."""
        return type(self) is ProphetKV

    def select(self, context: QueryContext) -> Selection:
        """Select the `context.budget` eligible tokens of highest fused score, and a first chunk if so set."""
        eligible = context.eligible
        if context.recompute_ratio == 0 or context.budget >= int(eligible.sum()):
            return Selection(top_positions(eligible.float(), eligible, context.budget))
        first = self._first_chunk(context)
        if context.budget == 0:  # so few tokens that the ratio is none of them
            return Selection(first[:0] if context.layout.exact_first_chunk else first)
        if first.shape[0]:
            eligible = eligible.clone()
            eligible[first] = False
        scores = self.scores(context)
        positions = top_positions(scores, eligible, context.budget)
        if not context.layout.exact_first_chunk:
            positions = torch.cat([first, positions])  # it stands before all others
        share = context.config.context_share if self.context_share is None else self.context_share
        return Selection(positions, visible=shared_context(scores, positions, context.is_chunk, share))

    def _first_chunk(self, context: QueryContext) -> torch.Tensor:
        """Return the positions of a first chunk that is exact, or is recomputed whole to be so; none if not so set."""
        first_chunk = self.first_chunk_for(context.config)
        wanted = first_chunk == "exact" or (first_chunk == "opening" and context.layout.exact_first_chunk)
        chunks = context.layout.chunks[:1] if wanted else ()
        rows = [row for chunk in chunks for row in range(chunk.start, chunk.stop)]
        positions = torch.tensor(rows, dtype=torch.int64, device=context.is_chunk.device)
        return positions[context.is_chunk[positions]]

    def first_chunk_for(self, config: ProphetKVConfig) -> FirstChunk:
        """See `Strategy`."""
        return self.first_chunk or config.first_chunk

    def scores(self, context: QueryContext) -> torch.Tensor:
        """Return the fused score of every token, `[N]` in fp32."""
        return context.attention_scores()
