"""The control for selection itself: the same budget, spent blindly."""

from __future__ import annotations

from typing import ClassVar

import torch

from prophetkv_rag.reuse.selection.base import QueryContext, Selection, Strategy, top_positions


class RandomTokens(Strategy):
    """Recompute a uniformly random set of chunk tokens, the same one for the same prompt; nested across ratios."""

    name: ClassVar[str] = "random"

    def select(self, context: QueryContext) -> Selection:
        """Select `context.budget` tokens at random, seeded by the prompt's token ids."""
        generator = torch.Generator().manual_seed(int(context.input_ids.sum()) * 1_000_003 + context.input_ids.shape[0])
        scores = torch.rand(context.is_chunk.shape[0], generator=generator, dtype=torch.float32).to(
            context.is_chunk.device
        )
        return Selection(top_positions(scores, context.eligible, context.budget))
