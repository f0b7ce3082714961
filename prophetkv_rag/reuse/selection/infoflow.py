"""InfoFlow KV: recompute the tokens that some token of the question attends to hard, in the last layers."""

from __future__ import annotations

from typing import ClassVar

import torch

from prophetkv_rag.config import FirstChunk, ProphetKVConfig
from prophetkv_rag.reuse.selection.base import QueryContext
from prophetkv_rag.reuse.selection.prophetkv import ProphetKV

COUNTED_LAYERS = 2


class InfoFlow(ProphetKV):
    """Selection of InfoFlow KV (arXiv 2603.05353), by what its authors' code does where it is told nothing else.

    In each of the last two layers the question's attention (softmax over all that a token sees) is averaged over heads;
    a context token's score is the L2 norm over the question's tokens, averaged over the two layers, at the positions
    that the tokens have in the prompt. All layers run to get there, and are charged. Its reordering of chunks is not
    part of a selection.
    """

    __slots__ = ()

    name: ClassVar[str] = "infoflow"

    def scores(self, context: QueryContext) -> torch.Tensor:
        """Return the score of every token, `[N]` in fp32, times the number of layers, which ranks alike."""
        first_layer = max(0, len(context.layers) - COUNTED_LAYERS)
        return context.attention_scores(score_softmax="full_row", first_layer=first_layer, over_rows="norm")

    def first_chunk_for(self, config: ProphetKVConfig) -> FirstChunk:
        """As its authors have it, unless the option asks for more."""
        return self.first_chunk or "cached"
