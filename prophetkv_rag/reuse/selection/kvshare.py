"""KVShare: deviating values weighted by the attention that their tokens receive from everybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prophetkv_rag.reuse.pruning import LayerView
from prophetkv_rag.reuse.selection.base import QueryContext, Selection, Strategy, top_positions, without_choice
from prophetkv_rag.reuse.selection.cacheblend import DECIDING_LAYER


@dataclass(frozen=True)
class KVShare(Strategy):
    """Prefill-stage selection of KVShare (arXiv 2503.16525, v2), decided at layer 1 as ProphetKV's authors ran it.

    Layers 0 and 1 run for all chunk tokens. A token's score at layer 1 is the attention it receives (the column sum of
    the attention matrix over all rows, averaged over heads) times the L1 distance of its fresh to its stale value; the
    top floor(p * C) go on. The budget charged is CacheBlend's. KVShare's second stage, which recomputes three more
    tokens at every decoding step, is not part of a prefill and left out.
    """

    name: ClassVar[str] = "kvshare"

    def select(self, context: QueryContext) -> Selection:
        """Start with every chunk token; the pruner keeps those with the highest score."""
        decided = without_choice(context)
        if decided is not None:
            return decided

        def prune(view: LayerView) -> torch.Tensor | None:
            if view.layer_idx != DECIDING_LAYER:
                return None
            assert view.attention_received is not None
            moved = (view.fresh_values.float() - view.stale_values.float()).abs().sum(dim=(0, 2))
            scores = torch.zeros(context.is_chunk.shape[0], dtype=torch.float32, device=view.rows.device)
            scores[view.rows] = moved
            return top_positions(scores * view.attention_received, context.is_chunk, context.budget)

        return Selection(context.is_chunk.nonzero()[:, 0], prune=prune, watched_layers=frozenset({DECIDING_LAYER}))
