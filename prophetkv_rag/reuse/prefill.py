"""From a laid-out prompt to a filled KV cache: load, assemble, stage I, stage II."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from prophetkv_rag.chunks import ChunkLibrary
from prophetkv_rag.config import ALONE_RATIO, ProphetKVConfig, check_recompute_ratio
from prophetkv_rag.conversations import AnsweredRows, ConversationTier
from prophetkv_rag.generation import InterruptibleLock
from prophetkv_rag.model import (
    CACHE_NAME,
    ModelSupport,
    RowsLayer,
    Runner,
    TransformersRunner,
    own_state,
    plain_forward,
    resumable_cache,
)
from prophetkv_rag.prompt import AnyPrompt, PromptLayout, PromptReader
from prophetkv_rag.report import PromptView, ReuseReport, Timings, end_stage
from prophetkv_rag.reuse.accounting import (
    attach_view,
    attended_share,
    ends_with_chunk,
    report_full_prefill,
    report_reuse,
)
from prophetkv_rag.reuse.assemble import assemble_caches
from prophetkv_rag.reuse.continuing import Continuation, choose
from prophetkv_rag.reuse.loading import default_ratio, load_new
from prophetkv_rag.reuse.recompute import recompute_rows
from prophetkv_rag.reuse.running import passes
from prophetkv_rag.reuse.selection import QueryContext, Strategy, make_strategy
from prophetkv_rag.reuse.selection.base import token_budget


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """A filled cache: `model.generate(**result.inputs)` goes on from it.

    Attributes:
        past_key_values: A transformers cache with one row for each of the prompt's N tokens. `generate` continues from
            it and computes the last token once more, for its logits; a decode loop of one's own that starts from
            `logits` feeds the next token to `prophetkv_rag.model.complete_cache(past_key_values)`.
        input_ids: `[1, N]`, int64.
        logits: `[1, vocab]` of the last token, fp32.
        report: What was reused and how long it took.
        recomputed: Ascending positions of the chunk tokens that ran through every layer at query time.
        visible: Ascending positions that those could attend to, as far as they stand before them; `None` for all.
        answered: What is to be kept of the prompt with its answer; `None` if nothing is.
    """

    past_key_values: Any
    input_ids: torch.Tensor
    logits: torch.Tensor
    report: ReuseReport
    recomputed: torch.Tensor
    visible: torch.Tensor | None = None
    answered: AnsweredRows | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """What `model.generate` takes, by the installed transformers' names (the cache has a new one from 5.24 on)."""
        return {"input_ids": self.input_ids, CACHE_NAME: self.past_key_values}

    def view(self) -> PromptView:
        """Return the prompt token by token: text, stage-I score, reused or recomputed; decoded at the first look."""
        assert self.report.view is not None
        return self.report.view


@dataclass(frozen=True, slots=True)
class Prefiller:
    """Runs prefills; `model_lock` is held while the model runs."""

    model: Any
    support: ModelSupport
    config: ProphetKVConfig
    library: ChunkLibrary
    reader: PromptReader
    context_window: int
    model_lock: AbstractContextManager[Any]
    conversations: ConversationTier | None = None

    @classmethod
    def over(
        cls, library: ChunkLibrary, config: ProphetKVConfig, reader: PromptReader, conversations: ConversationTier
    ) -> Prefiller:
        """Return one for a library's model."""
        window = library.context_window
        return cls(library.model, library.support, config, library, reader, window, library.model_lock, conversations)

    @own_state()
    def run(
        self,
        prompt: AnyPrompt,
        strategy: str | Strategy | None,
        recompute_ratio: float | None,
        query: str | None,
        answer_lock: InterruptibleLock | None = None,
        *,
        remember: bool = False,
        tenant: str = "",
    ) -> PrefillResult:
        """Prefill a prompt; see `ProphetKVEngine.prefill`.

        Args:
            prompt: Text as it is, chat messages, or a `Prompt`.
            strategy: `None` for the configured one.
            recompute_ratio: `None` for the configured one, which may be `None` as well: then it is `default_ratio`.
            query: The question, where the caller knows it apart from the prompt.
            answer_lock: Of a call that goes on to answer; there must be room for an answer then.
            remember: Whether to take over the rows of former prompts, and to say what is to be kept of this one.
            tenant: Whose former prompts.

        Raises:
            InputError, ContextWindowError, ModelChangedError: As `ProphetKVEngine.prefill`.
            Interrupted: If the answer is not wanted any more.
        """
        started = time.perf_counter()
        chosen = strategy if isinstance(strategy, Strategy) else make_strategy(strategy or self.config.strategy)
        ratio = self.config.recompute_ratio if recompute_ratio is None else check_recompute_ratio(recompute_ratio)
        self.library.refresh()
        layout = self.reader.read(prompt, query=query)
        tier = self.conversations if remember else None
        continued = Continuation.of(layout, tier, tenant, chosen, ratio)
        layout = continued.seen(layout)
        is_reuse = chosen.uses_caches and bool(layout.chunks or continued.length)
        layout.check_fits(self.context_window, is_reuse=is_reuse, is_answered=answer_lock is not None)
        timings = Timings(match=end_stage("match", started, prompt_tokens=layout.num_tokens, chunks=len(layout.chunks)))
        runner = self
        if answer_lock is not None:
            answer_lock.read(layout.num_tokens, self.context_window)
            runner = replace(self, model_lock=answer_lock)
        if is_reuse:
            result = runner.reuse(layout, chosen, ratio, timings, started, continued)
        else:
            result = runner.full(layout, chosen, timings, started, continued)
        if answer_lock is None:  # the cache is the caller's, who may write to it
            continued.keep_copy(result.answered, result.past_key_values.layers)
        return result

    def full(
        self, layout: PromptLayout, strategy: Strategy, timings: Timings, started: float, continued: Continuation
    ) -> PrefillResult:
        """Prefill the whole prompt by the model's plain forward, with the attention it was loaded with."""
        input_ids = layout.input_ids[None].to(self.model.device)
        running = time.perf_counter()
        with self.model_lock:
            self.library.state.check()
            # Plain layers: a cache made from the model's configuration drops rows outside sliding windows.
            cache = DynamicCache()
            logits = _settled(plain_forward(self.model, input_ids, cache))
        timings.recompute = end_stage("recompute", running, strategy=strategy.name, rows=layout.num_tokens)
        timings.ttft = time.perf_counter() - started
        report = report_full_prefill(layout, strategy.name, timings, num_layers=len(self.support.layers))
        filled = resumable_cache([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers])
        recomputed = layout.is_chunk.nonzero()[:, 0]
        attach_view(report, layout, recomputed, None, self.reader.tokens.codec)
        answered = continued.answered(layout)
        return PrefillResult(filled, input_ids, logits, report, recomputed.to(logits.device), answered=answered)

    def reuse(
        self,
        layout: PromptLayout,
        strategy: Strategy,
        ratio: float | None,
        timings: Timings,
        started: float,
        continued: Continuation,
    ) -> PrefillResult:
        """Take over a former prompt's rows and reuse the chunks' caches; recompute what the strategy chooses."""
        device = self.model.device
        mark = time.perf_counter()
        new_chunks = continued.new_chunks(layout)
        first_chunk = "cached" if ratio == 1 else strategy.first_chunk_for(self.config)  # at 1 it is computed anyway
        caches, origins, is_exact = load_new(continued, layout, self.library, self.model_lock, first_chunk)
        hits = sum(origin.status == "hit" for origin in origins)
        timings.load = end_stage("load", mark, hits=hits, chunks=len(origins))
        layout = replace(layout, exact_first_chunk=is_exact)
        if ratio is None:
            has_exact = is_exact or first_chunk == "exact"
            ratio = default_ratio(continued, layout, caches, has_exact_first=has_exact)
        behind = {chunk.key: cache.behind.traces for chunk, cache in zip(new_chunks, caches, strict=True)}

        with passes(self.model, self.model_lock, self.library.state.check, strategy) as runner:
            mark = time.perf_counter()
            layers = assemble_caches(
                self.support,
                caches,
                [chunk.start for chunk in new_chunks],
                layout.num_tokens + len(layout.probe_ids),
                dtype=getattr(torch, self.support.dtype),
                device=device,
                prefix=self.library.prefix,
                known_prefix=layout.known_prefix,
            )
            del caches
            moved = continued.put_into(layers, self.support)
            timings.assemble = time.perf_counter() - mark

            mark = time.perf_counter()
            context = self.query_context(layout, layers, ratio, runner)
            context.held_rows = continued.length
            context.exact_rows = max(layout.known_prefix, min(continued.length, layout.context_start))
            settled = continued.is_settled(layout.num_tokens).to(device)
            selection = choose(strategy, context, settled)
            timings.score = end_stage("score", mark, strategy=strategy.name, row_layers=context.row_layers)

            mark = time.perf_counter()
            wanted = ~context.is_chunk
            wanted[: max(context.exact_rows, continued.length)] = False
            always = wanted.nonzero()[:, 0]
            wanted[selection.positions] = True
            visible = selection.visible_keys(context.is_chunk)
            for layer in layers:
                layer.keys = layer.keys[:, :, : layout.num_tokens]
                layer.values = layer.values[:, :, : layout.num_tokens]
            done = recompute_rows(
                context.runner,
                self.support,
                layers,
                context.input_ids,
                wanted.nonzero()[:, 0],
                always=always,
                prune=selection.prune,
                watched=dict.fromkeys(selection.watched_layers, context.is_chunk),
                visible=visible,
            )
            _settled(done.logits)
            seconds = end_stage("recompute", mark, strategy=strategy.name, rows=done.rows.shape[0])
        if selection.positions.shape[0]:
            timings.recompute = seconds
        else:
            timings.suffix = seconds
        timings.ttft = time.perf_counter() - started
        recomputed = done.rows[context.is_chunk[done.rows]]
        report = report_reuse(
            layout,
            strategy.name,
            ratio,
            timings,
            origins,
            num_recomputed=recomputed.shape[0] + int(ends_with_chunk(layout)),
            num_held=continued.length,
            num_held_recomputed=int((recomputed < continued.length).sum()),
            row_layers=context.row_layers + done.row_layers,
            num_layers=len(self.support.layers),
            attended_share=1.0 if visible is None else attended_share(done.rows, context.is_chunk, visible),
        )
        attach_view(report, layout, recomputed, context.scores, self.reader.tokens.codec, num_held=continued.length)
        cache = resumable_cache([layer.keys for layer in layers], [layer.values for layer in layers])
        seen = None if visible is None else visible.nonzero()[:, 0]
        answered = continued.answered(layout, done.rows, visible=visible, behind=behind, moved=moved)
        return PrefillResult(cache, context.input_ids[None], done.logits, report, recomputed, seen, answered)

    def query_context(
        self,
        layout: PromptLayout,
        layers: Sequence[RowsLayer],
        ratio: float | None = None,
        runner: Runner | None = None,
    ) -> QueryContext:
        """Return what a strategy sees of a prompt over the given caches; by default at the configured ratio."""
        if ratio is None:
            ratio = ALONE_RATIO if self.config.recompute_ratio is None else self.config.recompute_ratio
        device = self.model.device
        eligible = layout.is_chunk.clone()
        if layout.exact_first_chunk and not self.config.first_chunk_eligible:
            eligible[layout.chunks[0].start : layout.chunks[0].stop] = False
        return QueryContext(
            runner=runner or TransformersRunner(self.model),
            support=self.support,
            layers=layers,
            layout=layout,
            input_ids=layout.input_ids.to(device),
            is_chunk=layout.is_chunk.to(device),
            eligible=eligible.to(device),
            budget=token_budget(ratio, layout.num_chunk_tokens),
            recompute_ratio=ratio,
            config=self.config,
        )


def _settled(logits: torch.Tensor) -> torch.Tensor:
    """Wait for the device to have made them: a GPU is only given work, and the clock would tell how long that took."""
    if logits.is_cuda:
        torch.cuda.current_stream(logits.device).synchronize()
    return logits
