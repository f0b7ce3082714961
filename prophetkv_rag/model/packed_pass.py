"""Several prompts' rows in one forward: side by side in one sequence, each attending to its own cache.

Projections, norms and MLPs look at a row at a time, so rows of different prompts may share them; only attention looks
at other rows, and it is done prompt by prompt. Nothing is padded, and no prompt can see another's keys. vLLM's runner
does the same on vLLM's modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from prophetkv_rag.model.attention import AttentionCall, AttentionPass, attention_implementation
from prophetkv_rag.model.cache_argument import cache_argument
from prophetkv_rag.model.cache_layers import cache_of
from prophetkv_rag.model.forward import backbone, running
from prophetkv_rag.model.runner import PassJob


class _PackedLayer(DynamicLayer):
    """Hands each prompt's new rows to that prompt's own layer, and keeps what those return for the attention."""

    def __init__(self, jobs: Sequence[PassJob], index: int) -> None:
        super().__init__()
        self._jobs, self._index = jobs, index
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows; what is returned goes through the model's code to our attention, which does not use it."""
        self.seen = [
            job.layers[self._index].update(key_states[:, :, rows], value_states[:, :, rows])
            for job, rows in _slices(self._jobs)
        ]
        return key_states, value_states


class _PackedPass(AttentionPass):
    """Lets every prompt's rows attend by its own pass."""

    def __init__(self, jobs: Sequence[PassJob], layers: Sequence[_PackedLayer]) -> None:
        self._jobs, self._layers = jobs, layers

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attend prompt by prompt."""
        seen = self._layers[call.layer_idx].seen
        attended = [
            job.attention_pass.attend(replace(call, query=call.query[:, :, rows], key=key, value=value))
            for (job, rows), (key, value) in zip(_slices(self._jobs), seen, strict=True)
        ]
        seen.clear()
        return torch.cat(attended, dim=1)


def _slices(jobs: Sequence[PassJob]) -> Iterator[tuple[PassJob, slice]]:
    start = 0
    for job in jobs:
        stop = start + job.input_ids.shape[1]
        yield job, slice(start, stop)
        start = stop


def run_packed(model: Any, jobs: Sequence[PassJob], *, logits: Sequence[bool]) -> list[torch.Tensor | None]:
    """Run the model's own forward over the rows of several jobs together.

    Args:
        model: A transformers causal language model; the caller holds `model_lock`.
        jobs: Of one sequence each.
        logits: For each job, whether to run the language-model head on its last row.

    Returns:
        For each job `[1, vocab]` logits of its last row in fp32, or `None`.
    """
    layers = [_PackedLayer(jobs, index) for index in range(len(jobs[0].layers))]
    input_ids = torch.cat([job.input_ids for job in jobs], dim=1)
    arguments = {
        "input_ids": input_ids,
        "position_ids": torch.cat([job.position_ids for job in jobs], dim=1),
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),  # as in `run_pass`
        "use_cache": True,
    }
    stops = accumulate(job.input_ids.shape[1] for job in jobs)
    last = [stop - 1 for stop, wanted in zip(stops, logits, strict=True) if wanted]
    found: list[torch.Tensor | None] = [None] * len(jobs)
    with running(model), attention_implementation(model, _PackedPass(jobs, layers)):
        if not last:
            headless = backbone(model)
            headless(**arguments, **cache_argument(headless, cache_of(layers)))
            return found
        rows = torch.tensor(last, device=input_ids.device)
        output = model(**arguments, **cache_argument(model, cache_of(layers)), logits_to_keep=rows)
    found_rows = output.logits[0]
    if found_rows.shape[0] != len(last):  # code that came with a checkpoint may not know rows by index
        found_rows = found_rows[rows]
    kept = iter(found_rows.float().split(1))
    return [next(kept) if wanted else None for wanted in logits]
