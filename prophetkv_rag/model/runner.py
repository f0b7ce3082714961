"""Who runs a model's own forward over rows with our attention in it: transformers here, vLLM's modules elsewhere.

Stage I, stage II and encoding are passes; all that differs between serving engines is how a pass reaches the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.cache_utils import CacheLayerMixin

from prophetkv_rag.model.attention import AttentionPass
from prophetkv_rag.model.cache_layers import cache_of
from prophetkv_rag.model.forward import run_pass


@dataclass(frozen=True, slots=True)
class PassJob:
    """Rows of one query, or a batch of chunks, to run through the model.

    Attributes:
        attention_pass: Gets every layer's attention call.
        input_ids: `[b, m]` tokens of the rows.
        position_ids: `[b, m]` positions that the model rotates by.
        layers: One per decoder layer; each receives the rows' keys and values and returns all that they attend to.
    """

    attention_pass: AttentionPass
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layers: Sequence[CacheLayerMixin]


class Runner(Protocol):
    """Runs passes on one model; the caller sees to it that nobody else runs the model meanwhile."""

    @property
    def model(self) -> Any:
        """The model; strategies that prune rows between its layers put their hooks there."""

    @property
    def device(self) -> torch.device:
        """Where rows are given and scores come out."""

    def run(self, jobs: Sequence[PassJob], *, logits: bool = False) -> list[torch.Tensor | None]:
        """Run jobs, together where the runner can.

        Args:
            jobs: What to run; they do not see each other.
            logits: Whether to run the language-model head on each job's last row.

        Returns:
            For each job `[b, vocab]` logits of the last row in fp32, or `None`.
        """

    def mean_over_ranks(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the mean of the scores that each part of the model's heads gave, the same to the bit on all parts."""


@dataclass(frozen=True, slots=True)
class TransformersRunner:
    """Runs passes on a transformers model, one job after the other."""

    model: Any

    @property
    def device(self) -> torch.device:
        """See `Runner`."""
        device: torch.device = self.model.device
        return device

    def run(self, jobs: Sequence[PassJob], *, logits: bool = False) -> list[torch.Tensor | None]:
        """See `Runner`."""
        return [
            run_pass(
                self.model,
                job.attention_pass,
                input_ids=job.input_ids,
                position_ids=job.position_ids,
                cache=cache_of(job.layers),
                logits=logits,
            )
            for job in jobs
        ]

    def mean_over_ranks(self, scores: torch.Tensor) -> torch.Tensor:
        """See `Runner`: all heads are here."""
        return scores
