"""Stage I: the question attends to the stale caches, and its attention says which tokens matter.

Run on the assembled cache before anything is recomputed. Rows: the prompt's prefix (exact, and kept), as far as it is
not that of the encoding prefix, whose rows are known, and the suffix;
tokens between the chunks are left out of this pass, neither computed nor seen, as the paper's context is the chunks
alone. A question that stands before the chunks asks from extra rows behind the prompt's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.model import ModelSupport, NormScoringPass, PassJob, RowsLayer, Runner, ScoringPass
from prophetkv_rag.prompt import PromptLayout
from prophetkv_rag.reuse.pruning import Stopping


@dataclass
class QueryContext:
    """What a strategy sees of one query.

    Attributes:
        runner: Runs the language model.
        support: The probe's findings.
        layers: The assembled stale cache, one `RowsLayer` per decoder layer.
        layout: The prompt.
        input_ids: `[N]` on the model's device.
        is_chunk: `[N]` bool on the model's device: tokens whose rows come from a chunk cache.
        eligible: `[N]` bool: tokens that may be selected.
        budget: Number of chunk tokens to recompute.
        recompute_ratio: The ratio that the budget comes from.
        config: The engine's settings.
        exact_rows: How many of the first rows, all before the context, the caches hold exactly already: what the
            prompt shares with the encoding prefix, and after a whole stage I all of the prefix.
        held_rows: How many of the first rows were taken over from a former prompt: they are all in the caches, whatever
            they are of, and are seen, but do not run.
        row_layers: Rows x layers run in stage I so far.
    """

    runner: Runner
    support: ModelSupport
    layers: Sequence[RowsLayer]
    layout: PromptLayout
    input_ids: torch.Tensor
    is_chunk: torch.Tensor
    eligible: torch.Tensor
    budget: int
    recompute_ratio: float
    config: ProphetKVConfig
    exact_rows: int = 0
    held_rows: int = 0
    row_layers: int = 0
    _scores: dict[tuple[str, str, int, int | None, str], torch.Tensor] = field(default_factory=dict)

    def attention_scores(
        self,
        *,
        score_softmax: str | None = None,
        query_scope: str | None = None,
        first_layer: int = 0,
        last_layer: int | None = None,
        over_rows: Literal["mean", "norm"] = "mean",
    ) -> torch.Tensor:
        """Run stage I and return the score of every token, `[N]` in fp32 (0 outside the chunks).

        Args:
            score_softmax: Overrides `config.score_softmax`.
            query_scope: Overrides `config.query_scope`.
            first_layer: The first layer whose attention counts; the layers before it run all the same.
            last_layer: The last one that counts; behind it stage I stops, but for one row. `None` for the model's.
            over_rows: How a layer's asking tokens are put together: by the mean of their weights, or the L2 norm, which
                goes with a softmax over the full row only.

        Raises:
            ValueError: For a norm over another softmax.
        """
        score_softmax = score_softmax or self.config.score_softmax
        query_scope = query_scope or self.config.query_scope
        if over_rows == "norm" and score_softmax != "full_row":
            msg = f"score_softmax is {score_softmax!r}; over_rows='norm' needs 'full_row'"
            raise ValueError(msg)
        if last_layer == len(self.support.layers) - 1:
            last_layer = None
        key = (score_softmax, query_scope, first_layer, last_layer, over_rows)
        if key not in self._scores:
            kind = NormScoringPass if over_rows == "norm" else ScoringPass
            asked = self._ask(kind, score_softmax == "context", query_scope, first_layer, last_layer)
            stopping = None if last_layer is None else Stopping(asked.scoring, self.layers, last_layer)
            with nullcontext() if stopping is None else stopping.between_layers_of(self.runner.model):
                self.runner.run([asked.job])
            self._answer(key, asked, stopping)
        return self._scores[key]

    @property
    def scores(self) -> torch.Tensor | None:
        """The scores that stage I gave last; `None` if no strategy asked for any."""
        return next(reversed(self._scores.values()), None)

    @property
    def model(self) -> Any:
        """The language model."""
        return self.runner.model

    def _ask(
        self,
        kind: type[ScoringPass],
        context_softmax: bool,
        query_scope: str,
        first_layer: int,
        last_layer: int | None,
    ) -> _Asked:
        layout, device = self.layout, self.input_ids.device
        num_tokens, num_probe = layout.num_tokens, len(layout.probe_ids)
        probe_ids = torch.tensor(layout.probe_ids, dtype=torch.int64, device=device)
        token_ids = torch.cat([self.input_ids, probe_ids])

        prefix = torch.arange(self.exact_rows, layout.context_start, device=device)
        suffix = torch.arange(max(layout.suffix_start, self.held_rows), num_tokens + num_probe, device=device)
        rows = torch.cat([prefix, suffix])
        asking = torch.zeros(num_tokens + num_probe, dtype=torch.bool, device=device)
        if num_probe:
            asking[num_tokens:] = True
        elif query_scope == "question" and layout.question_rows:
            asking[torch.tensor(layout.question_rows, device=device)] = True
            asking[: self.held_rows] = False
        if not bool(asking.any()):
            asking[suffix] = True

        hidden = torch.ones(num_tokens + num_probe, dtype=torch.bool, device=device)
        hidden[: layout.context_start] = False
        hidden[rows] = False
        hidden[: self.held_rows] = False
        hidden[:num_tokens] &= ~self.is_chunk
        scoring = kind(
            self.support.layers,
            rows,
            context=torch.cat([self.is_chunk, self.is_chunk.new_zeros(num_probe)]),
            scoring_rows=asking[rows],
            context_softmax=context_softmax,
            first_layer=first_layer,
            last_layer=last_layer,
            hidden_keys=hidden if bool(hidden.any()) else None,
        )
        for layer in self.layers:
            layer.rows = rows
        job = PassJob(scoring, token_ids[None, rows], rows[None], self.layers)
        return _Asked(job, scoring)

    def _answer(self, key: tuple[str, str, int, int | None, str], asked: _Asked, stopping: Stopping | None) -> None:
        if stopping is None:
            self.exact_rows = self.layout.context_start
            self.row_layers += asked.job.input_ids.shape[1] * len(self.support.layers)
        else:  # the prefix's later layers are missing: what is not known from elsewhere is left to stage II
            self.row_layers += stopping.row_layers
        self._scores[key] = self.runner.mean_over_ranks(asked.scoring.scores[: self.layout.num_tokens])


@dataclass(frozen=True, slots=True)
class _Asked:
    """Stage I of one query, ready to run."""

    job: PassJob
    scoring: ScoringPass


def ask_together(contexts: Sequence[QueryContext]) -> None:
    """Run stage I of several queries on one model in one pass; their `attention_scores()` then have it already."""
    asked = []
    for context in contexts:
        config = context.config
        asked.append(context._ask(ScoringPass, config.score_softmax == "context", config.query_scope, 0, None))
    if asked:
        contexts[0].runner.run([one.job for one in asked])
    for context, one in zip(contexts, asked, strict=True):
        context._answer((context.config.score_softmax, context.config.query_scope, 0, None, "mean"), one, None)
