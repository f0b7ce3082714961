"""Stage II: only the given rows run through the model again, writing fresh keys and values in place.

Right after the embedding the hidden states are those of the given rows alone (arXiv 2602.02579, section 4.3 and
Algorithm 1): at every layer their keys and values replace the stale ones, then each row attends causally, by its true
position, to the merged cache. Tokens outside the chunks ride in the same pass. A strategy may say that recomputed
tokens see a part of the cache only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from prophetkv_rag.model import ModelSupport, PassJob, RowsLayer, RowsPass, Runner, SparsePass
from prophetkv_rag.reuse.pruning import Pruner, Pruning


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What stage II did.

    Attributes:
        logits: `[1, vocab]` of the prompt's last token, fp32.
        rows: The positions that ran through every layer.
        row_layers: Rows x layers that were run.
    """

    logits: torch.Tensor
    rows: torch.Tensor
    row_layers: int


def recompute_rows(
    runner: Runner,
    support: ModelSupport,
    layers: Sequence[RowsLayer],
    input_ids: torch.Tensor,
    rows: torch.Tensor,
    *,
    always: torch.Tensor | None = None,
    prune: Pruner | None = None,
    watched: Mapping[int, torch.Tensor] | None = None,
    visible: torch.Tensor | None = None,
) -> Recomputed:
    """Run `rows` through all layers over the assembled cache.

    Args:
        runner: Runs the language model.
        support: The probe's findings.
        layers: The assembled cache; its rows are overwritten in place, all others are left untouched bit by bit.
        input_ids: `[N]` token ids of the prompt.
        rows: `[m]` ascending positions to compute; the last one must be the prompt's last token.
        always: Positions that pruning never drops (the tokens outside the chunks).
        prune: Called after each layer; what it drops keeps the fresh keys and values of the layers so far.
        watched: See `RowsPass`; what was received is handed to `prune`.
        visible: `[N]`, bool: the keys that rows outside `always` see, their own among them; `None` for all.

    Raises:
        ValueError: For `visible` together with `watched`, which counts the attention to all keys.
    """
    job = rows_job(support, layers, input_ids, rows, always=always, watched=watched, visible=visible)
    if prune is None:
        (logits,) = runner.run([job], logits=True)
        assert logits is not None
        return Recomputed(logits, rows, rows.shape[0] * len(support.layers))
    pruning = Pruning(job.attention_pass, layers, prune, always)
    with pruning.between_layers_of(runner.model):
        (logits,) = runner.run([job], logits=True)
    assert logits is not None
    return Recomputed(logits, job.attention_pass.rows, pruning.row_layers)


@dataclass(frozen=True, slots=True)
class RowsJob(PassJob):
    """A `PassJob` of stage II."""

    attention_pass: RowsPass


def rows_job(
    support: ModelSupport,
    layers: Sequence[RowsLayer],
    input_ids: torch.Tensor,
    rows: torch.Tensor,
    *,
    always: torch.Tensor | None = None,
    watched: Mapping[int, torch.Tensor] | None = None,
    visible: torch.Tensor | None = None,
) -> RowsJob:
    """Return what `recompute_rows` runs, for whoever runs several prompts' rows together; its arguments are those."""
    for layer in layers:
        layer.rows = rows
    rows_pass = _pass_of(support, rows, always=always, watched=watched, visible=visible)
    return RowsJob(rows_pass, input_ids[None, rows], rows[None], layers)


def _pass_of(
    support: ModelSupport,
    rows: torch.Tensor,
    *,
    always: torch.Tensor | None,
    watched: Mapping[int, torch.Tensor] | None,
    visible: torch.Tensor | None,
) -> RowsPass:
    if visible is None:
        return RowsPass(support.layers, rows, last_row_only=True, watched=watched)
    if watched:
        msg = "a selection with `watched_layers` cannot have `visible` tokens; give one of the two"
        raise ValueError(msg)
    narrow = torch.ones_like(visible)
    if always is not None:
        narrow[always] = False
    narrow[rows[-1:]] = False
    return SparsePass(support.layers, rows, narrow=narrow, visible=visible)
