"""A step's new caches, encoded on vLLM's own module by all ranks together and stored by the first."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from prophetkv_rag.chunks import ChunkEncoder, EncodingPrefix
from prophetkv_rag.config import Encoding
from prophetkv_rag.errors import ProphetKVError
from prophetkv_rag.integrations.vllm.heads import whole_heads
from prophetkv_rag.integrations.vllm.identity import opening_of
from prophetkv_rag.integrations.vllm.messages import StepPlan, StepReport
from prophetkv_rag.integrations.vllm.rank_caches import RankCaches
from prophetkv_rag.integrations.vllm.runner import VLLMRunner
from prophetkv_rag.integrations.vllm.together import run_together
from prophetkv_rag.model import ModelSupport
from prophetkv_rag.store import CacheIdentity, ChunkCache
from prophetkv_rag.store.disk import DiskStore

logger = logging.getLogger(__name__)

NOT_TAKEN = "the store did not take it"
"""Why a cache is not there though nothing failed."""

Prefix = Callable[[CacheIdentity], EncodingPrefix | None]
"""Returns what chunks are encoded behind."""


class StepEncoder:
    """Encodes and stores what a `StepPlan` asks for; does not raise.

    Args:
        runner: The module.
        support: What the probe found.
        store: Of this process.
        caches: Of this rank, in that store.
        encoding: What chunks are encoded behind.
        max_rows: Rows that one forward may have.
        num_kv_heads: The model's, on all ranks.
    """

    def __init__(
        self,
        runner: VLLMRunner,
        support: ModelSupport,
        store: DiskStore,
        caches: RankCaches,
        encoding: Encoding,
        *,
        max_rows: int,
        num_kv_heads: int,
    ) -> None:
        self._runner = runner
        self._support = support
        self._store = store
        self._caches = caches
        self._encoding = encoding
        self._max_rows = max_rows
        self._num_kv_heads = num_kv_heads

    def run(self, plan: StepPlan, prefix: Prefix, report: StepReport) -> None:
        """Encode and store; what stands behind others by their caches, as they are stored."""
        self._store.drop_from_memory(plan.encode)  # all ranks shall read what rank 0 writes now
        error = run_together(partial(self._encode_and_keep, plan, prefix, report))
        if self._runner.rank:  # a neighbour may have been read before it was encoded anew itself
            self._store.drop_from_memory(plan.encode)
        if error is not None:
            logger.error("chunks could not be encoded", exc_info=error)
            report.not_encoded |= {key: str(error) for key in plan.encode if key not in report.encoded}

    def _encode_and_keep(self, plan: StepPlan, prefix: Prefix, report: StepReport) -> None:
        encoder = ChunkEncoder(
            self._runner,
            self._support,
            prefix(plan.identity),
            plan.identity,
            self._encoding,
            self._caches,
            state=None,
            context_window=self._support.context_window,
            batch_tokens=self._max_rows,
        )
        for is_chained in (True, False):
            jobs = {k: job for k, job in plan.encode.items() if not job.kept_with and job.is_chained == is_chained}
            chunks = {key: job.input_ids for key, job in jobs.items()}
            behind = {key: job.behind for key, job in jobs.items() if job.behind}
            encoded = encoder.encode_behind(chunks, behind, is_chained=is_chained) if behind else None
            for index, part in encoded or encoder.encode(list(chunks.values())):
                self._keep(list(jobs)[index], part, plan.identity, report)
        jobs = {key: job for key, job in plan.encode.items() if job.kept_with}
        for index, part in encoder.encode([job.input_ids for job in jobs.values()]):
            key = list(jobs)[index]
            self._keep(key, part, opening_of(plan.identity), report, kept_with=jobs[key].kept_with)

    def _keep(
        self, key: str, part: ChunkCache, identity: CacheIdentity, report: StepReport, *, kept_with: str = ""
    ) -> None:
        """Store a cache, of which this rank has a part."""
        cache = whole_heads(part, self._runner, total=self._num_kv_heads)
        if self._runner.rank != 0:
            return
        try:
            if kept_with:  # not by the store's thread, which may be reading ahead
                self._store.catalog.keep_with(key, kept_with)
            self._store.put(key, cache.owned(), fingerprint=identity.fingerprint, if_referenced=bool(kept_with))
            is_stored = key in self._store
        except (ProphetKVError, OSError) as error:  # a full disk, for one; the other ranks go on, so this one does
            logger.warning("the cache %s could not be stored: %s", key, error)
            report.not_encoded[key] = str(error)
            return
        if is_stored:
            report.encoded.append(key)
        else:  # no room, or what it bears a trace of was deleted meanwhile
            report.not_encoded[key] = NOT_TAKEN
