"""QCFuse: recompute the tokens that the question attends to in three layers at the middle."""

from __future__ import annotations

from typing import ClassVar

import torch

from prophetkv_rag.config import FirstChunk, ProphetKVConfig
from prophetkv_rag.reuse.selection.base import QueryContext
from prophetkv_rag.reuse.selection.prophetkv import ProphetKV

COUNTED_LAYERS = 3


class QCFuse(ProphetKV):
    """Selection of QCFuse (arXiv 2606.05875), by its authors' code: three layers count, and stage I ends behind them.

    In each of them the question's attention (softmax over all that a token sees) is averaged over heads and question
    tokens. Which three is a table for four models there, found by measuring, that lie between 40 and 66% of the depth;
    here it is three from the middle on. Its digest, a tenth of the keys that the question sees up to there, is about
    reading less from a disk, and not part of a selection.
    """

    __slots__ = ()

    name: ClassVar[str] = "qcfuse"

    def scores(self, context: QueryContext) -> torch.Tensor:
        """Return the score of every token, `[N]` in fp32, times the number of layers, which ranks alike."""
        first_layer = len(context.layers) // 2
        last_layer = min(first_layer + COUNTED_LAYERS, len(context.layers)) - 1
        return context.attention_scores(score_softmax="full_row", first_layer=first_layer, last_layer=last_layer)

    def first_chunk_for(self, config: ProphetKVConfig) -> FirstChunk:
        """As its authors have it, unless the option asks for more."""
        return self.first_chunk or "cached"
