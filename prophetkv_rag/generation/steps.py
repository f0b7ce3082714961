"""One step of an answer: its newest tokens through the model, beside those of other answers that wait for theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prophetkv_rag.generation.interrupt import InterruptibleLock
from prophetkv_rag.generation.turns import Step
from prophetkv_rag.model import LayerSupport, PassJob, StepPass, plain_forward


@dataclass(frozen=True, slots=True)
class Steps:
    """Runs the steps of one answer.

    Attributes:
        model: The language model.
        cache: KV cache of all tokens so far, `GrowingLayer`s; a step adds its rows.
        model_lock: Of this call; where it has turns, steps of several calls run together.
        check: Called before the model runs, under its lock; raises if it must not.
        layers: The probe's findings, for steps that run together.
    """

    model: Any
    cache: Any
    model_lock: InterruptibleLock
    check: Callable[[], None]
    layers: Sequence[LayerSupport] = ()

    def run(self, token_ids: torch.Tensor, start: int) -> torch.Tensor:
        """Run tokens, `[1, m]`, that stand behind `start` others; returns the last one's logits, `[1, vocab]`.

        Raises:
            Interrupted: If the call must stop.
        """
        turns = self.model_lock.turns
        if turns is None:
            with self.model_lock:
                return self._alone(token_ids)

        def undo() -> None:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :start], layer.values[:, :, :start]

        rows = torch.arange(start, start + token_ids.shape[1], device=token_ids.device)
        job = PassJob(StepPass(self.layers, rows), token_ids, rows[None], self.cache.layers)
        logits = turns.run(Step(job, lambda: self._alone(token_ids), undo), self.model_lock)
        assert logits is not None
        return logits

    def _alone(self, token_ids: torch.Tensor) -> torch.Tensor:
        self.check()
        return plain_forward(self.model, token_ids, self.cache)
