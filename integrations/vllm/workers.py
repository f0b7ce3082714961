"""The workers' half: fills requests' pages by stage I and II, and encodes new chunks, on vLLM's own module."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from prophetkv_rag.chunks import EncodingPrefix, encode_prefix
from prophetkv_rag.integrations.vllm.encoding import StepEncoder
from prophetkv_rag.integrations.vllm.identity import opening_of
from prophetkv_rag.integrations.vllm.messages import LoadPlan, StepPlan, StepReport
from prophetkv_rag.integrations.vllm.page_reader import page_readers
from prophetkv_rag.integrations.vllm.pages import HeldRows, PagedLayer, Pages
from prophetkv_rag.integrations.vllm.plans import groups_of, layout_of, stage_one_rows, stage_two_rows
from prophetkv_rag.integrations.vllm.rank_caches import RankCaches
from prophetkv_rag.integrations.vllm.rank_reads import RankReads
from prophetkv_rag.integrations.vllm.runner import VLLMRunner
from prophetkv_rag.integrations.vllm.settings import ConnectorSettings
from prophetkv_rag.integrations.vllm.together import run_together
from prophetkv_rag.model import ModelSupport
from prophetkv_rag.reuse import Assembly, QueryContext, RowsJob, ask_together, make_strategy, rows_job, token_budget
from prophetkv_rag.store import CacheIdentity, ChunkCache
from prophetkv_rag.store.disk import DiskStore

logger = logging.getLogger(__name__)


class WorkerStages:
    """Runs what a `StepPlan` asks for; no method raises.

    Args:
        runner: The module.
        support: What the probe found.
        store: Of this process.
        settings: The connector's.
        block_size: Rows of one of vLLM's blocks.
        max_rows: Rows that one forward may have: what vLLM measured its memory with.
        num_kv_heads: The model's, on all ranks.
        num_blocks: vLLM's blocks, which are all unused yet.
    """

    def __init__(
        self,
        runner: VLLMRunner,
        support: ModelSupport,
        store: DiskStore,
        settings: ConnectorSettings,
        *,
        block_size: int,
        max_rows: int,
        num_kv_heads: int,
        num_blocks: int,
    ) -> None:
        self._runner = runner
        self.support = support
        self._store = store
        self._caches = RankCaches(store, runner, num_kv_heads)
        self._reads = RankReads(store)
        self._config = settings.engine_config()
        self._encoder = StepEncoder(
            runner, support, store, self._caches, settings.placed, max_rows=max_rows, num_kv_heads=num_kv_heads
        )
        self._strategy = make_strategy("prophetkv")
        self._block_size = block_size
        self._max_rows = max_rows
        readers = page_readers(runner.layers, num_blocks, block_size)
        self._readers = readers if all(runner.all_agree([readers is not None])) else None
        self._prefixes: dict[str, EncodingPrefix | None] = {}
        self.failed_blocks: set[int] = set()
        """Blocks that were to be filled and were not; the connector hands them to vLLM."""

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self._runner.device

    def read_ahead(self, plan: StepPlan) -> None:
        """Begin to read what later steps need."""
        self._reads.begin(plan)

    def run(self, plan: StepPlan) -> StepReport:
        """Do what a step asks for."""
        report = StepReport(can_read=self._readers is not None)
        if plan.loads:
            started = time.perf_counter()
            self._load(plan, report)
            seconds = time.perf_counter() - started
            report.seconds = {load.request_id: seconds for load in plan.loads}
        if plan.encode:
            self._encoder.run(plan, self._prefix, report)
        elif plan.is_idle:
            self._reads.give_way()
        self._reads.tell(report)
        return report

    def _load(self, plan: StepPlan, report: StepReport) -> None:
        self._store.forget_deleted()
        # Ranks read the same files, and still one may miss one, or have another: then none of them uses it.
        found, report.lost = self._caches.load(plan.loads, plan.identity, opening_of(plan.identity))
        ready: list[_Query] = []
        for load, caches in zip(plan.loads, found, strict=True):
            if caches is None:
                self._fail(load, "a chunk's cache is missing or bad", report)
            elif load.num_held and self._readers is None:
                self._fail(load, "vLLM's pages cannot be read", report)
            else:
                ready.append(_Query(load, caches, plan.identity))
        for group in groups_of(ready, lambda query: query.num_rows, self._max_rows):
            error = run_together(partial(self._fill, group, plan.identity))
            if error is not None:
                logger.error("ProphetKV leaves %d requests to vLLM", len(group), exc_info=error)
                for query in group:
                    self._fail(query.load, f"{type(error).__name__}: {error}", report)

    def _fail(self, load: LoadPlan, reason: str, report: StepReport) -> None:
        report.failed[load.request_id] = reason
        self.failed_blocks.update(load.block_ids[load.first_row // self._block_size :])

    def _fill(self, queries: Sequence[_Query], identity: CacheIdentity) -> None:
        """Stage I and stage II of several requests, and their rows into the pages."""
        prefix = self._prefix(identity)
        for query in queries:
            query.prepare(self, prefix)
        asking = [query.context for query in queries if query.has_choice]
        for contexts in groups_of(asking, lambda context: stage_one_rows(context.layout), self._max_rows):
            ask_together(contexts)
        if len(queries) == 1:
            for part in queries[0].jobs(self, self._max_rows):
                self._runner.run([part])
            return
        jobs = [job for query in queries for job in query.jobs(self, self._max_rows)]  # one of each: they fit together
        if jobs:
            self._runner.run(jobs)

    def _prefix(self, identity: CacheIdentity) -> EncodingPrefix | None:
        if identity.fingerprint not in self._prefixes:
            self._prefixes[identity.fingerprint] = encode_prefix(self._runner, self.support, identity.prefix_ids)
        return self._prefixes[identity.fingerprint]

    def assembly(self, query: _Query, prefix: EncodingPrefix | None) -> Assembly:
        """Return what a query's layers are made of."""
        layout, is_held = query.layout, query.load.num_held > 0
        return Assembly(
            self.support,
            query.caches,
            [chunk.start for chunk in layout.chunks],
            layout.num_tokens + len(layout.probe_ids),
            dtype=getattr(torch, self.support.dtype),
            device=self._runner.device,
            prefix=None if is_held else prefix,
            known_prefix=0 if is_held else layout.known_prefix,
        )

    def paged(self, query: _Query, assembly: Assembly, pages: Pages | None) -> list[PagedLayer]:
        """Return a query's layers."""
        load, held = query.load, None
        if load.num_held and self._readers is not None:
            held = HeldRows(load.block_ids, self._block_size, load.num_held, self._readers, self._runner.device)
        return [PagedLayer(assembly, index, layer, pages, held) for index, layer in enumerate(self._runner.layers)]

    def context(self, query: _Query, layers: Sequence[PagedLayer]) -> QueryContext:
        """Return what the strategy sees of a query."""
        layout, device, ratio = query.layout, self._runner.device, query.load.recompute_ratio
        config = replace(self._config, first_chunk=query.load.first_chunk)
        context = QueryContext(
            runner=self._runner,
            support=self.support,
            layers=layers,
            layout=layout,
            input_ids=layout.input_ids.to(device),
            is_chunk=layout.is_chunk.to(device),
            eligible=layout.is_chunk.to(device),
            budget=token_budget(ratio, layout.num_chunk_tokens),
            recompute_ratio=ratio,
            config=config,
        )
        context.exact_rows = layout.known_prefix
        context.held_rows = query.load.num_held
        return context

    def pages(self, query: _Query) -> Pages:
        """Return where a query's rows go."""
        return Pages(
            query.load.block_ids,
            self._block_size,
            first_row=query.load.first_row,
            stop=query.layout.num_tokens - 1,
            device=self._runner.device,
        )

    def jobs(self, context: QueryContext, layers: Sequence[PagedLayer], most: int) -> Iterator[RowsJob]:
        """Yield stage II of a query, in ascending parts of so many rows; each must have run before the next is made.

        Rows see no later ones, so parts give what one pass would. Without a row to compute stale ones are written.
        """
        layout = context.layout
        selection = self._strategy.select(context)
        wanted = ~context.is_chunk
        # Stage I wrote into layers that are gone by now, so all that was not known before is computed here.
        wanted[: layout.known_prefix] = False
        wanted[-1] = False  # vLLM's own
        always = wanted.nonzero()[:, 0]
        wanted[selection.positions] = True
        rows = wanted.nonzero()[:, 0]
        if rows.shape[0] == 0:
            for layer in layers:
                layer.write_stale()
            return
        visible = selection.visible_keys(context.is_chunk)
        for start in range(0, rows.shape[0], most):
            part = rows[start : start + most]
            for layer in layers:
                layer.is_last = bool(part[-1] == rows[-1])
            yield rows_job(self.support, layers, context.input_ids, part, always=always, visible=visible)


class _Query:
    """One request on its way through the stages."""

    context: QueryContext

    def __init__(self, load: LoadPlan, caches: list[ChunkCache], identity: CacheIdentity) -> None:
        self.load, self.caches = load, caches
        self.layout = layout_of(load, identity.prefix_ids)

    def prepare(self, stages: WorkerStages, prefix: EncodingPrefix | None) -> None:
        self._assembly = stages.assembly(self, prefix)
        self.context = stages.context(self, stages.paged(self, self._assembly, None))

    @property
    def num_rows(self) -> int:
        """Rows that stage II runs."""
        return stage_two_rows(self.layout, self.load.recompute_ratio, self.load.first_chunk)

    @property
    def has_choice(self) -> bool:
        """Whether stage I decides anything."""
        return 0 < self.context.budget < int(self.context.eligible.sum())

    def jobs(self, stages: WorkerStages, most: int) -> Iterator[RowsJob]:
        return stages.jobs(self.context, stages.paged(self, self._assembly, stages.pages(self)), most)
