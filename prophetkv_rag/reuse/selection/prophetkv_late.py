"""ProphetKV by the later layers' attention alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from prophetkv_rag.reuse.selection.base import QueryContext
from prophetkv_rag.reuse.selection.prophetkv import ProphetKV


@dataclass(frozen=True, slots=True)
class ProphetKVLate(ProphetKV):
    """ProphetKV (arXiv 2602.02579, Algorithm 1) with another sum: only the later layers' attention counts.

    Ours, not the paper's. Up to the last layer that counts stage I runs as ever, and is charged; the layers before need
    no weights, which saves a little time.

    Attributes:
        start: Where in the depth counting begins, in [0, 1): 0.5 counts the second half of the layers (of an odd number
            the larger half), 0 counts all, which is `prophetkv`.
        stop: Where it ends, above `start` and at most 1; stage I stops there, but for one row, and so does its charge.
            A prompt's prefix, as far as it is not the encoding prefix's, is then computed by stage II.
    """

    name: ClassVar[str] = "prophetkv_late"

    start: float = 0.5
    stop: float = 1.0

    def __post_init__(self) -> None:
        ProphetKV.__post_init__(self)
        if isinstance(self.start, str) or not 0 <= self.start < 1:
            msg = f"start is {self.start!r}; allowed: a number from 0 (all layers) to below 1"
            raise ValueError(msg)
        if isinstance(self.stop, str) or not self.start < self.stop <= 1:
            msg = f"stop is {self.stop!r}; allowed: a number above start ({self.start}) up to 1 (the last layer)"
            raise ValueError(msg)

    def scores(self, context: QueryContext) -> torch.Tensor:
        """Return the score of every token, `[N]` in fp32, summed over the layers that count."""
        num_layers = len(context.layers)
        first_layer = int(self.start * num_layers)
        last_layer = max(first_layer, math.ceil(self.stop * num_layers - 1e-9) - 1)
        return context.attention_scores(first_layer=first_layer, last_layer=last_layer)
