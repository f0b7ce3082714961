"""The contract of a strategy, and what it may look at."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from prophetkv_rag.config import FirstChunk, ProphetKVConfig
from prophetkv_rag.reuse.pruning import Pruner
from prophetkv_rag.reuse.stage_one import QueryContext

__all__ = ["QueryContext", "Selection", "Strategy", "allowed_option", "token_budget", "top_positions", "without_choice"]


@dataclass(frozen=True, slots=True)
class Selection:
    """What a strategy chose.

    Attributes:
        positions: `[k]` ascending positions of the chunk tokens that are recomputed from the embedding on.
        prune: For strategies that decide between layers (CacheBlend, hybrids that run the first layers in full):
            called after each layer with stale and fresh rows, returns the positions that go on. `None` keeps all.
        watched_layers: Layers whose `LayerView` shall tell the attention that each token received there.
        visible: `[v]` positions of the chunk tokens that recomputed ones see, beside each other and all tokens outside
            the chunks; `None` for all. Tokens outside the chunks always see all.
    """

    positions: torch.Tensor
    prune: Pruner | None = None
    watched_layers: frozenset[int] = frozenset()
    visible: torch.Tensor | None = None

    def visible_keys(self, is_chunk: torch.Tensor) -> torch.Tensor | None:
        """Return `[N]`, bool: what recomputed chunk tokens see; `None` for everything.

        Args:
            is_chunk: `[N]`, bool.
        """
        if self.visible is None or self.positions.shape[0] == 0:
            return None
        seen = ~is_chunk
        seen[self.positions] = True
        seen[self.visible] = True
        return seen


class Strategy(ABC):
    """Chooses tokens for stage II.

    A strategy sees the assembled stale cache, the prompt's layout and the budget, and may run stage I through the
    context. It holds no state of a query: one instance serves many threads.
    """

    name: ClassVar[str]
    uses_caches: ClassVar[bool] = True

    @property
    def shares_passes(self) -> bool:
        """Whether its passes may run beside those of other prompts: it neither prunes nor runs the model itself."""
        return False

    @abstractmethod
    def select(self, context: QueryContext) -> Selection:
        """Choose at most `context.budget` chunk tokens (ProphetKV may add the prompt's first chunk to them)."""

    def first_chunk_for(self, config: ProphetKVConfig) -> FirstChunk:
        """What becomes of a prompt's first chunk; see `ProphetKVConfig.first_chunk`. As it is, unless overridden."""
        return "cached"


def without_choice(context: QueryContext) -> Selection | None:
    """Return the selection of no token or of all, where the budget leaves no choice; `None` where it does."""
    everything = context.is_chunk.nonzero()[:, 0]
    if context.budget == 0:
        return Selection(everything[:0])
    return Selection(everything) if context.budget >= everything.shape[0] else None


def allowed_option(strategy: Strategy, option: str, allowed: tuple[object, ...]) -> None:
    """Raise `ValueError` unless a strategy's option has one of the allowed values."""
    value = getattr(strategy, option)
    if value not in allowed:
        msg = f"{option} is {value!r}; allowed: {', '.join(map(str, allowed))}"
        raise ValueError(msg)


def token_budget(recompute_ratio: float, num_chunk_tokens: int) -> int:
    """Return floor(p * C), the number of chunk tokens to recompute, safe from the float noise of an exact product."""
    return min(num_chunk_tokens, math.floor(recompute_ratio * num_chunk_tokens + 1e-9))


def top_positions(scores: torch.Tensor, eligible: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count` eligible positions of highest score, ascending; ties go to the lower position.

    The order is total, so the sets of two budgets are nested.

    Args:
        scores: `[n]`.
        eligible: `[n]`, bool.
        count: How many, capped at the number of eligible positions.
    """
    candidates = eligible.nonzero()[:, 0]
    order = torch.sort(scores[candidates], descending=True, stable=True).indices[:count]
    return candidates[order].sort().values
