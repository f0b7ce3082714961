"""The workers' half: fills requests' pages by stage I and II, and encodes new chunks, on vLLM's own module."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from prophetkv_rag.chunks import EncodingPrefix, encode_chunks, encode_prefix
from prophetkv_rag.integrations.vllm.heads import own_heads, whole_heads
from prophetkv_rag.integrations.vllm.messages import Identity, LoadPlan, StepPlan, StepReport
from prophetkv_rag.integrations.vllm.pages import PagedLayer, Pages
from prophetkv_rag.integrations.vllm.plans import layout_of, stage_one_rows, stage_two_rows
from prophetkv_rag.integrations.vllm.runner import VLLMRunner
from prophetkv_rag.integrations.vllm.settings import ConnectorSettings
from prophetkv_rag.model import ModelSupport
from prophetkv_rag.reuse import Assembly, QueryContext, RowsJob, ask_together, make_strategy, rows_job, token_budget
from prophetkv_rag.store import ChunkCache, ChunkStore

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
    """

    def __init__(
        self,
        runner: VLLMRunner,
        support: ModelSupport,
        store: ChunkStore,
        settings: ConnectorSettings,
        *,
        block_size: int,
        max_rows: int,
        num_kv_heads: int,
    ) -> None:
        self._runner = runner
        self.support = support
        self._store = store
        self._config = settings.engine_config()
        self._strategy = make_strategy("prophetkv")
        self._block_size = block_size
        self._max_rows = max_rows
        self._num_kv_heads = num_kv_heads
        self._prefixes: dict[str, EncodingPrefix | None] = {}
        self.failed_blocks: set[int] = set()
        """Blocks that were to be filled and were not; the connector hands them to vLLM."""

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self._runner.device

    def run(self, plan: StepPlan) -> StepReport:
        """Do what a step asks for."""
        report = StepReport()
        if plan.read_ahead:
            self._store.read_ahead(plan.read_ahead, fingerprint=plan.identity.fingerprint)
        if plan.loads:
            started = time.perf_counter()
            self._load(plan, report)
            seconds = time.perf_counter() - started
            report.seconds = {load.request_id: seconds for load in plan.loads}
        if plan.encode:
            self._encode(plan, report)
        return report

    def _load(self, plan: StepPlan, report: StepReport) -> None:
        found = [self._caches(load, plan.identity, report) for load in plan.loads]
        # Ranks read the same files, and still one may miss one: then none of them uses it.
        agreed = self._runner.all_agree([caches is not None for caches in found])
        ready: list[_Query] = []
        for load, caches, is_there in zip(plan.loads, found, agreed, strict=True):
            if is_there and caches is not None:
                ready.append(_Query(load, caches, plan.identity))
            else:
                self._fail(load, "a chunk's cache is missing or bad", report)
        for group in _groups(ready, lambda query: query.num_rows, self._max_rows):
            try:
                self._fill(group, plan.identity)
            except Exception as error:
                logger.exception("ProphetKV leaves %d requests to vLLM", len(group))
                for query in group:
                    self._fail(query.load, f"{type(error).__name__}: {error}", report)

    def _fail(self, load: LoadPlan, reason: str, report: StepReport) -> None:
        report.failed[load.request_id] = reason
        self.failed_blocks.update(load.block_ids[load.first_row // self._block_size :])

    def _caches(self, load: LoadPlan, identity: Identity, report: StepReport) -> list[ChunkCache] | None:
        caches = []
        for match in load.matches:
            cache = self._store.find(match.key, fingerprint=identity.fingerprint, input_ids=None).cache
            wanted = load.input_ids[match.start : match.stop]
            rows = slice(match.skipped, match.skipped + len(wanted))
            if cache is None or not cache.is_of(identity.dtype) or cache.input_ids[rows].tolist() != list(wanted):
                report.lost.append(match.key)
                return None
            caches.append(own_heads(cache, rows, self._runner, total=self._num_kv_heads))
        return caches

    def _fill(self, queries: Sequence[_Query], identity: Identity) -> None:
        """Stage I and stage II of several requests, and their rows into the pages."""
        prefix = self._prefix(identity)
        for query in queries:
            query.prepare(self, prefix)
        asking = [query.context for query in queries if query.has_choice]
        for contexts in _groups(asking, lambda context: stage_one_rows(context.layout), self._max_rows):
            ask_together(contexts)
        jobs = [job for query in queries if (job := query.rows(self)) is not None]
        if jobs:
            self._runner.run(jobs)

    def _prefix(self, identity: Identity) -> EncodingPrefix | None:
        if identity.fingerprint not in self._prefixes:
            self._prefixes[identity.fingerprint] = encode_prefix(self._runner, self.support, identity.prefix_ids)
        return self._prefixes[identity.fingerprint]

    def _encode(self, plan: StepPlan, report: StepReport) -> None:
        keys, identity = list(plan.encode), plan.identity
        try:
            chunks = [plan.encode[key] for key in keys]
            prefix = self._prefix(identity)
            for index, part in encode_chunks(self._runner, self.support, prefix, chunks, batch_tokens=self._max_rows):
                cache = whole_heads(part, self._runner, total=self._num_kv_heads)
                if self._runner.rank == 0:
                    self._store.put(keys[index], cache.owned(), fingerprint=identity.fingerprint)
                    report.encoded.append(keys[index])
        except Exception as error:  # a full disk, for one
            logger.exception("chunks could not be encoded")
            report.not_encoded = {key: str(error) for key in keys if key not in report.encoded}

    def assembly(self, query: _Query, prefix: EncodingPrefix | None) -> Assembly:
        """Return what a query's layers are made of."""
        layout = query.layout
        return Assembly(
            self.support,
            query.caches,
            [chunk.start for chunk in layout.chunks],
            layout.num_tokens + len(layout.probe_ids),
            dtype=getattr(torch, self.support.dtype),
            device=self._runner.device,
            prefix=prefix,
            known_prefix=layout.known_prefix,
        )

    def paged(self, assembly: Assembly, pages: Pages | None) -> list[PagedLayer]:
        """Return a query's layers."""
        return [PagedLayer(assembly, index, layer, pages) for index, layer in enumerate(self._runner.layers)]

    def context(self, query: _Query, layers: Sequence[PagedLayer]) -> QueryContext:
        """Return what the strategy sees of a query."""
        layout, device, ratio = query.layout, self._runner.device, query.load.recompute_ratio
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
            config=self._config,
        )
        context.exact_rows = layout.known_prefix
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

    def job(self, context: QueryContext, layers: Sequence[PagedLayer]) -> RowsJob | None:
        """Return stage II of a query; `None` if it has no row to compute: its stale rows are written then."""
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
            return None
        visible = None
        if selection.visible is not None and selection.positions.shape[0]:
            visible = ~context.is_chunk
            visible[selection.positions] = True
            visible[selection.visible] = True
        return rows_job(self.support, layers, context.input_ids, rows, always=always, visible=visible)


class _Query:
    """One request on its way through the stages."""

    context: QueryContext

    def __init__(self, load: LoadPlan, caches: list[ChunkCache], identity: Identity) -> None:
        self.load, self.caches = load, caches
        self.layout = layout_of(load, identity)

    def prepare(self, stages: WorkerStages, prefix: EncodingPrefix | None) -> None:
        self._assembly = stages.assembly(self, prefix)
        self.context = stages.context(self, stages.paged(self._assembly, None))

    @property
    def num_rows(self) -> int:
        """Rows that stage II runs."""
        return stage_two_rows(self.layout, self.load.recompute_ratio)

    @property
    def has_choice(self) -> bool:
        """Whether stage I decides anything."""
        return 0 < self.context.budget < int(self.context.eligible.sum())

    def rows(self, stages: WorkerStages) -> RowsJob | None:
        return stages.job(self.context, stages.paged(self._assembly, stages.pages(self)))


def _groups(items: Sequence[Any], rows: Callable[[Any], int], most: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    total = 0
    for item in items:
        if group and total + rows(item) > most:
            yield group
            group, total = [], 0
        group.append(item)
        total += rows(item)
    if group:
        yield group
