"""Stage I and stage II of a prompt beside those of other prompts, in one forward where they wait for it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from prophetkv_rag.generation.interrupt import InterruptibleLock
from prophetkv_rag.generation.turns import Step
from prophetkv_rag.model import PassJob, TransformersRunner


@dataclass(frozen=True, slots=True)
class SharedPasses(TransformersRunner):
    """A `Runner` for one call, which must not hold the model: each of its passes waits for its turn.

    Attributes:
        model_lock: Of this call, with turns.
    """

    model_lock: InterruptibleLock

    def run(self, jobs: Sequence[PassJob], *, logits: bool = False) -> list[torch.Tensor | None]:
        """See `Runner`.

        Raises:
            Interrupted: If the call must stop.
        """
        turns = self.model_lock.turns
        assert turns is not None
        return [turns.run(self._step(job, logits), self.model_lock) for job in jobs]

    def _step(self, job: PassJob, logits: bool) -> Step:
        alone = partial(TransformersRunner(self.model).run, [job], logits=logits)
        return Step(job, lambda: alone()[0], job.attention_pass.restart, logits=logits)
