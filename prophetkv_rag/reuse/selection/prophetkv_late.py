"""ProphetKV by the later layers' attention alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prophetkv_rag.reuse.selection.base import QueryContext
from prophetkv_rag.reuse.selection.prophetkv import ProphetKV


@dataclass(frozen=True, slots=True)
class ProphetKVLate(ProphetKV):
    """ProphetKV (arXiv 2602.02579, Algorithm 1) with another sum: only the later layers' attention counts.

    Ours, not the paper's. Stage I runs through all layers as ever, so its charge is `prophetkv`'s; the layers that do
    not count need no weights, which saves a little time.

    Attributes:
        start: Where in the depth counting begins, in [0, 1): 0.5 counts the second half of the layers (of an odd number
            the larger half), 0 counts all, which is `prophetkv`.
    """

    name: ClassVar[str] = "prophetkv_late"

    start: float = 0.5

    def __post_init__(self) -> None:
        ProphetKV.__post_init__(self)
        if isinstance(self.start, str) or not 0 <= self.start < 1:
            msg = f"start is {self.start!r}; allowed: a number from 0 (all layers) to below 1"
            raise ValueError(msg)

    def scores(self, context: QueryContext) -> torch.Tensor:
        """Return the score of every token, `[N]` in fp32, summed over the layers that count."""
        return context.attention_scores(first_layer=int(self.start * len(context.layers)))
