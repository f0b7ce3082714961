"""CacheBlend: recompute the tokens whose values deviate most at an early layer, whatever is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from prophetkv_rag.reuse.pruning import LayerView, Pruner
from prophetkv_rag.reuse.selection.base import (
    QueryContext,
    Selection,
    Strategy,
    allowed_option,
    top_positions,
    without_choice,
)

DECIDING_LAYER = 1
"""Index of the layer at which fresh and stale rows are compared; K and V of layer 0 depend on the token alone."""
SURPLUS = 1.5
"""Gradual filtering keeps this multiple of the budget after the deciding layer (the paper: "slightly higher")."""


@dataclass(frozen=True)
class CacheBlend(Strategy):
    """High-KV-deviation selection of CacheBlend (arXiv 2405.16444).

    Layers 0 and 1 run for all chunk tokens. At layer 1 a token's deviation is the squared distance of its fresh to its
    stale row, summed over heads and channels; the floor(p * C) most deviating go on. Rows that are dropped keep their
    fresh K/V up to the layer they were dropped after and their stale ones beyond. The budget really charged is
    therefore above the nominal p: (2 C + p C (L - 2)) / (C L).

    The authors' code drops them inside layer 1, between its projections and its attention, which gives the same rows
    for most of a layer less. Here a model's own decoder layer runs as a whole, and what runs is charged.

    Attributes:
        deviation: `"v"` compares values, as the authors' code does; `"k"` compares rotated keys, as LMCache does;
            `"kv"` adds both, as the paper's text reads.
        filtering: `"single"` selects once, as the authors' code does. `"gradual"` is the paper's: 1.5 times the budget
            goes on after layer 1 and shrinks, by each layer's own deviation among those left, linearly to the budget at
            half the depth (the paper gives no numbers).
    """

    name: ClassVar[str] = "cacheblend"
    deviation: Literal["v", "k", "kv"] = "v"
    filtering: Literal["single", "gradual"] = "single"

    def __post_init__(self) -> None:
        allowed_option(self, "deviation", ("v", "k", "kv"))
        allowed_option(self, "filtering", ("single", "gradual"))

    def select(self, context: QueryContext) -> Selection:
        """Start with every chunk token; the pruner keeps the most deviating."""
        decided = without_choice(context)
        return decided or Selection(context.is_chunk.nonzero()[:, 0], prune=self._pruner(context))

    def _pruner(self, context: QueryContext) -> Pruner:
        num_layers = len(context.support.layers)

        def prune(view: LayerView) -> torch.Tensor | None:
            count = self.kept_after(view.layer_idx, context.budget, num_layers)
            current = context.is_chunk[view.rows]
            if count is None or count >= int(current.sum()):
                return None
            scores = torch.zeros(context.is_chunk.shape[0], dtype=torch.float32, device=view.rows.device)
            scores[view.rows] = self._deviation(view)
            running = torch.zeros_like(context.is_chunk)
            running[view.rows[current]] = True
            return top_positions(scores, running, count)

        return prune

    def kept_after(self, layer_idx: int, budget: int, num_layers: int) -> int | None:
        """Return how many chunk tokens go on after a layer, or `None` where nothing is dropped."""
        if layer_idx < DECIDING_LAYER or (self.filtering == "single" and layer_idx > DECIDING_LAYER):
            return None
        if self.filtering == "single":
            return budget
        last = max(DECIDING_LAYER + 1, num_layers // 2)
        left = max(0.0, (last - layer_idx) / (last - DECIDING_LAYER))
        return math.ceil(budget * (1 + (SURPLUS - 1) * left) - 1e-9)  # without the float noise of an exact product

    def _deviation(self, view: LayerView) -> torch.Tensor:
        total = torch.zeros(view.rows.shape[0], dtype=torch.float32, device=view.rows.device)
        if "k" in self.deviation:
            total += (view.fresh_keys.float() - view.stale_keys.float()).square().sum(dim=(0, 2))
        if "v" in self.deviation:
            total += (view.fresh_values.float() - view.stale_values.float()).square().sum(dim=(0, 2))
        return total
