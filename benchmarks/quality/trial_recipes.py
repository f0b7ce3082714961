"""The recipes that trials.py tries, as strategies: what each recomputes is charged by the engine's own account."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from prophetkv_rag.model import AttentionCall, RowsPass, cache_of, run_pass
from prophetkv_rag.reuse import LayerView, QueryContext, Selection, Strategy, recompute_rows, top_positions


class Asking(RowsPass):
    """Runs rows and keeps what some of them attend to in the context, per layer and head: `mass` `[L, H, n]`."""

    def __init__(self, context: QueryContext, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """Prepare the pass; `weights` `[m]` is each row's say, 0 for rows that do not ask."""
        layout = context.layout
        hidden = torch.zeros_like(context.is_chunk)
        hidden[layout.context_start : layout.suffix_start] = ~context.is_chunk[
            layout.context_start : layout.suffix_start
        ]
        super().__init__(context.support.layers, rows, hidden_keys=hidden if bool(hidden.any()) else None)
        self.asking = weights.nonzero()[:, 0]
        self.weights = weights[self.asking]
        visible = torch.arange(context.is_chunk.shape[0]) < rows[self.asking, None]
        self.counts = visible & context.is_chunk
        self.context = context.is_chunk
        self.mass: list[torch.Tensor] = []

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attend as ever; the masses are softmax weights over the context alone, as stage I's."""
        groups = call.query.shape[1] // call.key.shape[1]
        keys = call.key[0].repeat_interleave(groups, dim=0)
        logits = call.query[0][:, self.asking] @ keys.transpose(1, 2) * call.scaling
        weights = torch.softmax(logits.masked_fill(~self.counts, float("-inf")), dim=-1).nan_to_num()
        self.mass.append(torch.einsum("r,hrn->hn", self.weights, weights))
        return super().attend(call)


def ask(context: QueryContext, rows: torch.Tensor, weights: torch.Tensor, kind: type[Asking] = Asking) -> torch.Tensor:
    """Run rows over the assembled cache, writing their keys and values; returns the masses, `[L, H, n]`."""
    asking = kind(context, rows, weights)
    for layer in context.layers:
        layer.rows = rows
    run_pass(
        context.model,
        asking,
        input_ids=context.input_ids[None, rows],
        position_ids=rows[None],
        cache=cache_of(context.layers),
    )
    return torch.stack(asking.mass)


def stage_one(context: QueryContext, kind: type[Asking] = Asking) -> torch.Tensor:
    """Stage I with its masses kept apart, charged as it is."""
    layout = context.layout
    rows = torch.cat(
        [
            torch.arange(context.exact_rows, layout.context_start),
            torch.arange(layout.suffix_start, layout.num_tokens),
        ]
    )
    mass = ask(context, rows, (rows >= layout.suffix_start) / (layout.num_tokens - layout.suffix_start), kind)
    context.exact_rows = layout.context_start
    context.row_layers += rows.shape[0] * len(context.layers)
    return mass


@dataclass
class TwoRounds(Strategy):
    """Trial a. `again`: how many of the suffix's last rows ask in round two (0: all)."""

    name: ClassVar[str] = "two rounds"
    again: int = 0
    joined: bool = False
    is_free: bool = False
    first_share: float = 0.5

    def select(self, context: QueryContext) -> Selection:
        """Spend half of what is left when the second asking is paid, look again, spend the rest."""
        layout, num_layers = context.layout, len(context.layers)
        scores = context.attention_scores()
        asking = torch.arange(layout.suffix_start, layout.num_tokens)[-self.again :]
        count = context.budget - (0 if self.is_free else asking.shape[0])
        if count < 2:  # nothing is left for a second round
            return Selection(top_positions(scores, context.eligible, context.budget))
        first = top_positions(scores, context.eligible, max(1, int(count * self.first_share)))
        weights = torch.cat([torch.zeros(first.shape[0]), torch.full((asking.shape[0],), 1 / asking.shape[0])])
        if self.joined:
            weights[: first.shape[0]] = 1 / first.shape[0]
        fresher = ask(context, torch.cat([first, asking]), weights).mean(1).sum(0)
        context.row_layers += (first.shape[0] + (0 if self.is_free else asking.shape[0])) * num_layers
        left = context.eligible.clone()
        left[first] = False
        return Selection(top_positions(fresher, left, count - first.shape[0]))


@dataclass
class FirstLayersFull(Strategy):
    """Trial b."""

    name: ClassVar[str] = "first layers in full"
    num_full: int = 2

    @staticmethod
    def tokens_left(budget: int, num_chunk_tokens: int, num_layers: int, num_full: int) -> int:
        """How many tokens go on after the first layers, for the price of `budget` tokens in all layers."""
        return (budget * num_layers - num_full * num_chunk_tokens) // (num_layers - num_full)

    def select(self, context: QueryContext) -> Selection:
        """Ask over a cache whose first layers are fresh, and let the chosen go on."""
        everything = context.is_chunk.nonzero()[:, 0]
        count = self.tokens_left(context.budget, everything.shape[0], len(context.layers), self.num_full)
        # The first layers run here for stage I, and a second time below: charged once, as states would be kept.
        recompute_rows(
            context.runner,
            context.support,
            context.layers,
            context.input_ids,
            torch.arange(context.exact_rows, context.layout.num_tokens),
            always=torch.arange(context.layout.context_start),
            prune=lambda view: view.rows[-1:] if view.layer_idx == self.num_full - 1 else None,
        )
        chosen = top_positions(context.attention_scores(), context.eligible, count)

        def prune(view: LayerView) -> torch.Tensor | None:
            return chosen if view.layer_idx == self.num_full - 1 else None

        return Selection(everything, prune=prune)


@dataclass
class Spans(Strategy):
    """Trial e: the best tokens with `reach` neighbours on both sides, as many as the budget holds."""

    name: ClassVar[str] = "spans"
    reach: int = 1

    def select(self, context: QueryContext) -> Selection:
        """Go down the ranking; every token brings its neighbours along until the budget is spent."""
        scores = context.attention_scores()
        chosen = torch.zeros_like(context.eligible)
        left = context.budget
        for position in torch.sort(scores.masked_fill(~context.eligible, -1), descending=True, stable=True).indices:
            span = torch.arange(max(0, int(position) - self.reach), int(position) + self.reach + 1)
            span = span[span < chosen.shape[0]]
            new = span[context.eligible[span] & ~chosen[span]][:left]
            chosen[new] = True
            left -= new.shape[0]
            if left == 0:
                break
        return Selection(chosen.nonzero()[:, 0])


@dataclass
class TimesDeviation(Strategy):
    """Trial f: attention times the distance of stale and fresh values at layer 1, for which two layers run in full."""

    name: ClassVar[str] = "times deviation"
    is_free: bool = False

    def select(self, context: QueryContext) -> Selection:
        """Ask, run two layers for all chunk tokens, let the best of the product go on."""
        scores, num_layers = context.attention_scores(), len(context.layers)
        everything = context.is_chunk.nonzero()[:, 0]
        count = context.budget
        if self.is_free:
            context.row_layers -= 2 * (everything.shape[0] - count)
        else:
            count = FirstLayersFull.tokens_left(context.budget, everything.shape[0], num_layers, 2)

        def prune(view: LayerView) -> torch.Tensor | None:
            if view.layer_idx != 1:
                return None
            product = torch.zeros_like(scores)
            product[view.rows] = (view.fresh_values - view.stale_values).square().sum((0, 2)).sqrt()
            return top_positions(product * scores, context.eligible, count)

        return Selection(everything, prune=prune)


@dataclass
class Weighted(Strategy):
    """Trial c: stage I with a weight per layer and head, `[L, H]`."""

    name: ClassVar[str] = "weighted"
    weights: torch.Tensor

    def select(self, context: QueryContext) -> Selection:
        """As `prophetkv`, by the weighted masses, which are kept."""
        self.mass = stage_one(context)
        scores = torch.einsum("lh,lhn->n", self.weights, self.mass)
        return Selection(top_positions(scores, context.eligible, context.budget))


@dataclass
class Known(Strategy):
    """Trial c's oracles: scores that full prefill gave, `[N]`."""

    name: ClassVar[str] = "oracle"
    scores: torch.Tensor

    def select(self, context: QueryContext) -> Selection:
        """Pay for stage I, and know better."""
        context.attention_scores()
        return Selection(top_positions(self.scores, context.eligible, context.budget))


@dataclass
class Peek(Strategy):
    """Looks at a prompt's stale cache: stage I's masses, and the distance of the values from full prefill's."""

    name: ClassVar[str] = "peek"
    values: list[torch.Tensor]

    def select(self, context: QueryContext) -> Selection:
        """Select nothing."""
        num_tokens = context.layout.num_tokens
        pairs = zip(context.layers, self.values, strict=True)
        self.distance = torch.stack([(a.values[0, :, :num_tokens] - b[0]).norm(dim=-1) for a, b in pairs])
        self.scores = context.attention_scores()
        context.exact_rows = context.layout.known_prefix
        self.mass = stage_one(context)
        return Selection(context.is_chunk.nonzero()[:0, 0])


def fit(prompts: list[tuple[np.ndarray, np.ndarray]], *, steps: int = 300) -> np.ndarray:
    """Return the weights of a mixture of attention distributions that makes the targets most likely.

    Args:
        prompts: Per prompt the masses `[K, n]` and the target `[n]`.
        steps: Of expectation maximisation; every one raises the likelihood, which has no local maxima.
    """
    weights = np.full(prompts[0][0].shape[0], 1 / prompts[0][0].shape[0])
    for _ in range(steps):
        new = np.zeros_like(weights)
        for masses, target in prompts:
            mixture = weights @ masses
            new += weights * (masses @ (target / np.maximum(mixture, 1e-12)))
        weights = new / new.sum()
    return weights
