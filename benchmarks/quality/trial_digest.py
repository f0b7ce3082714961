"""Trial g: stage I over a digest of the context (QCFuse, arXiv 2606.05875, asks one; its own digest is another)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from trial_recipes import Asking, stage_one

from prophetkv_rag.model import AttentionCall
from prophetkv_rag.reuse import QueryContext, Selection, Strategy, top_positions


class AskingDigest(Asking):
    """Asks as `Asking` does, over a digest: the means of `block` context tokens are one key and one value."""

    block = 4

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attend to the digest; a block weighs as its tokens together, and each of them gets an equal part of it."""
        in_run = self.context.cumsum(0) - 1
        starts = ~self.context | (in_run % self.block == 0) | ~self.context.roll(1)
        member = starts.cumsum(0) - 1
        sizes = torch.bincount(member).to(call.query.dtype)
        groups = call.query.shape[1] // call.key.shape[1]

        def means(rows: torch.Tensor) -> torch.Tensor:
            pooled = rows.new_zeros(rows.shape[0], sizes.shape[0], rows.shape[2]).index_add_(1, member, rows)
            return (pooled / sizes[:, None]).repeat_interleave(groups, dim=0)

        last = torch.zeros_like(sizes).scatter_reduce_(0, member, torch.arange(member.shape[0]).to(sizes), "amax")
        seen = last <= self.rows[:, None]
        if self.hidden_keys is not None:
            seen &= ~self.hidden_keys[last.long()]
        logits = call.query[0] @ means(call.key[0]).transpose(1, 2) * call.scaling + sizes.log()
        logits = logits.masked_fill(~seen, float("-inf"))
        counted = logits[:, self.asking].masked_fill(~self.context[last.long()], float("-inf"))
        mass = torch.einsum("r,hrb->hb", self.weights, torch.softmax(counted, dim=-1).nan_to_num())
        self.mass.append((mass / sizes)[:, member] * self.context)
        return (torch.softmax(logits, dim=-1) @ means(call.value[0])).transpose(0, 1)[None]


@dataclass
class Digest(Strategy):
    """Trial g: the question attends to means of `block` tokens each."""

    name: ClassVar[str] = "digest"
    block: int = 4

    def select(self, context: QueryContext) -> Selection:
        """As `prophetkv`; a block's tokens score alike, and those of one that fits in part only go from its first."""
        kind = type("Blocks", (AskingDigest,), {"block": self.block})
        scores = stage_one(context, kind).mean(1).sum(0)
        return Selection(top_positions(scores, context.eligible, context.budget))
