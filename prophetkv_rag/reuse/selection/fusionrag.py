"""FusionRAG: recompute the tokens that the question attends to in the final layer."""

from __future__ import annotations

from typing import ClassVar

import torch

from prophetkv_rag.config import FirstChunk, ProphetKVConfig
from prophetkv_rag.reuse.selection.base import QueryContext
from prophetkv_rag.reuse.selection.prophetkv import ProphetKV


class FusionRAG(ProphetKV):
    """The online half of FusionRAG (arXiv 2601.12904): a token's score is the question's attention in the last layer.

    ProphetKV's stage I, of which one layer counts: softmax over all that a question token sees, averaged over heads and
    question tokens. All layers run to get there, and are charged. The offline half, which encodes a chunk behind
    similar ones, is a matter of what a chunk is encoded behind, and not part of a selection.
    """

    __slots__ = ()

    name: ClassVar[str] = "fusionrag"

    def scores(self, context: QueryContext) -> torch.Tensor:
        """Return the last layer's score of every token, `[N]` in fp32."""
        return context.attention_scores(score_softmax="full_row", first_layer=len(context.layers) - 1)

    def first_chunk_for(self, config: ProphetKVConfig) -> FirstChunk:
        """As its authors have it, unless the option asks for more."""
        return self.first_chunk or "cached"
