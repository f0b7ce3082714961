"""EPIC: recompute the first tokens of every chunk, whatever is asked and whatever the chunks say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prophetkv_rag.reuse.selection.base import QueryContext, Selection, Strategy


@dataclass(frozen=True)
class Epic(Strategy):
    """LegoLink of EPIC (arXiv 2410.15332): the first k tokens of every chunk, from the embedding on.

    EPIC's chunk 0 is the system prompt, which is exact; so is ours, and a first chunk that follows the very prefix it
    was encoded behind. Such a chunk is skipped; any other first chunk counts like the rest.

    Attributes:
        k: Tokens per chunk (the paper's are 0 to 32), whatever the ratio between 0 and 1; `None` matches the ratio:
            tokens are dealt to the chunks in rounds, so each gets the same number and the first ones the remainder.
    """

    name: ClassVar[str] = "epic"
    k: int | None = None

    def __post_init__(self) -> None:
        if self.k is not None and (not isinstance(self.k, int) or self.k < 0):
            msg = f"k is {self.k!r}; it must be a whole number from 0, or left out to match the ratio"
            raise ValueError(msg)

    def select(self, context: QueryContext) -> Selection:
        """Select chunk starts."""
        num_chunk_tokens = int(context.is_chunk.sum())
        if context.budget >= num_chunk_tokens:
            return Selection(context.is_chunk.nonzero()[:, 0])
        chunks = context.layout.spans[int(context.layout.exact_first_chunk) :]
        # Round r takes the r-th token of every chunk that has one.
        rounds = [
            chunk.start + offset
            for offset in range(max((chunk.stop - chunk.start for chunk in chunks), default=0))
            for chunk in chunks
            if offset < chunk.stop - chunk.start
        ]
        if self.k is None or context.recompute_ratio == 0:
            chosen = rounds[: context.budget]
        else:
            chosen = [start for chunk in chunks for start in range(chunk.start, min(chunk.start + self.k, chunk.stop))]
        positions = torch.tensor(sorted(chosen), dtype=torch.int64, device=context.is_chunk.device)
        return Selection(positions[context.is_chunk[positions]])
