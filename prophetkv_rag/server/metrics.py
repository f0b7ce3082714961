"""What Prometheus reads at `/metrics`, in a registry of the application's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prophetkv_rag.errors import StoreError
from prophetkv_rag.server.work_queue import WorkQueue
from prophetkv_rag.store import RemoteStats, StoreStats

if TYPE_CHECKING:
    from prophetkv_rag.conversations import ConversationTier
    from prophetkv_rag.report import ReuseReport

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ServerMetrics:
    """Counters that requests write, and gauges that are read when somebody asks."""

    def __init__(
        self,
        stats: Callable[[], StoreStats],
        queues: Sequence[WorkQueue],
        conversations: ConversationTier | None = None,
    ) -> None:
        """Make the metrics of one application.

        Args:
            stats: Reads the store of chunk caches.
            queues: Whose lengths are shown.
            conversations: What is remembered of former prompts, if anything.
        """
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "prophetkv_requests",
            "Chat requests by outcome: stop, length, cancelled, deadline, or the code of an error.",
            ["outcome"],
            registry=self.registry,
        )
        self.chunks = Counter(
            "prophetkv_chunk_lookups",
            "Chunks in answered prompts: hit, miss (encoded for the prompt), corrupt, unused (by the strategy), "
            "remembered (with the conversation).",
            ["status"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "prophetkv_prompt_tokens",
            "Prompt tokens: remembered (of the conversation), reused from caches, recomputed (chunk tokens), fresh.",
            ["kind"],
            registry=self.registry,
        )
        self.generated_tokens = Counter("prophetkv_generated_tokens", "Tokens of answers.", registry=self.registry)
        self.ttft = self._histogram("prophetkv_ttft_seconds", "From a request's arrival to its first token.")
        self.prefill = self._histogram("prophetkv_prefill_seconds", "The prefill alone, without waiting for a turn.")
        self.waited = self._histogram("prophetkv_queue_wait_seconds", "From a request's arrival to its turn.")
        for status in ("hit", "miss", "corrupt", "unused", "remembered"):
            self.chunks.labels(status)
        for kind in ("remembered", "reused", "recomputed", "fresh"):
            self.prompt_tokens.labels(kind)
        self.registry.register(_Gauges(stats, queues, conversations))

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, registry=self.registry, buckets=_SECONDS)

    def count_prefill(self, report: ReuseReport, *, ttft_s: float, waited_s: float) -> None:
        """Count a prompt that was prefilled."""
        for chunk in report.chunks:
            self.chunks.labels(chunk.status).inc()
        self.prompt_tokens.labels("remembered").inc(report.remembered_tokens)
        self.prompt_tokens.labels("reused").inc(report.reused_tokens)
        self.prompt_tokens.labels("recomputed").inc(report.recomputed_tokens)
        self.prompt_tokens.labels("fresh").inc(report.fresh_tokens)
        self.prefill.observe(report.timings_s.ttft)
        self.waited.observe(waited_s)
        self.ttft.observe(ttft_s)


class _Gauges(Collector):
    def __init__(
        self,
        stats: Callable[[], StoreStats],
        queues: Sequence[WorkQueue],
        conversations: ConversationTier | None,
    ) -> None:
        self._stats, self._queues, self._conversations = stats, queues, conversations

    def describe(self) -> Iterable[Metric]:
        """Keep the registry from reading the store when it is made."""
        return []

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("prophetkv_store_up", "Whether the store of chunk caches can be read.")
        try:
            stats = self._stats()
        except StoreError:  # the other figures are wanted now more than ever
            up.add_metric([], 0)
        else:
            up.add_metric([], 1)
            yield from _of_store(stats)
        yield up
        if self._conversations is not None:
            kept = self._conversations.stats()
            yield GaugeMetricFamily("prophetkv_conversation_bytes", "Bytes of remembered prompts.", value=kept.nbytes)
            yield GaugeMetricFamily("prophetkv_conversation_tokens", "Tokens of those.", value=kept.tokens)
        waiting = GaugeMetricFamily("prophetkv_queue_length", "Requests waiting for their turn.", labels=["queue"])
        running = GaugeMetricFamily("prophetkv_running", "Requests being worked on.", labels=["queue"])
        for queue in self._queues:
            waiting.add_metric([queue.name], queue.num_waiting)
            running.add_metric([queue.name], queue.num_running)
        yield waiting
        yield running


def _remote_metrics(remote: RemoteStats) -> Iterator[Metric]:
    yield GaugeMetricFamily("prophetkv_remote_up", "0 while the remote tier fails.", value=int(remote.is_answering))
    yield GaugeMetricFamily("prophetkv_remote_bytes", "Bytes of this store's caches there.", value=remote.nbytes)
    yield GaugeMetricFamily("prophetkv_remote_chunks", "This store's caches there.", value=remote.chunks)
    yield GaugeMetricFamily("prophetkv_remote_waiting", "Uploads and deletes still to be done.", value=remote.waiting)
    calls = CounterMetricFamily(
        "prophetkv_remote_calls", "Calls of the remote tier, by what came of them.", labels=["outcome"]
    )
    for outcome in ("hits", "misses", "bad", "failures", "uploads", "deletes"):
        calls.add_metric([outcome], getattr(remote, outcome))
    yield calls


def _of_store(stats: StoreStats) -> Iterator[Metric]:
    yield GaugeMetricFamily("prophetkv_cache_bytes", "Bytes of all chunk caches in the store.", value=stats.nbytes)
    yield GaugeMetricFamily("prophetkv_cache_chunks", "Chunk caches in the store.", value=stats.chunks)
    yield GaugeMetricFamily("prophetkv_cache_tokens", "Tokens of all chunk caches in the store.", value=stats.tokens)
    tiers = GaugeMetricFamily("prophetkv_tier_bytes", "Bytes of chunk caches by tier.", labels=["tier"])
    tiers.add_metric(["ram"], stats.ram_nbytes)
    if stats.location != "memory":
        tiers.add_metric(["disk"], stats.nbytes)
    yield tiers
    if stats.max_nbytes is not None:
        yield GaugeMetricFamily("prophetkv_cache_limit_bytes", "Limit of the disk tier.", value=stats.max_nbytes)
    lookups = CounterMetricFamily(
        "prophetkv_store_lookups",
        "Look-ups of caches: found in ram, on disk, behind it, or computed again: miss (none), corrupt (bad).",
        labels=["result"],
    )
    for result, count in (
        ("ram", stats.ram_hits),
        ("disk", stats.hits - stats.ram_hits - stats.remote_hits),
        *([("remote", stats.remote_hits)] if stats.remote is not None else []),
        ("miss", stats.misses),
        ("corrupt", stats.corrupt),
    ):
        lookups.add_metric([result], count)
    yield lookups
    if stats.remote is not None:
        yield from _remote_metrics(stats.remote)
    yield CounterMetricFamily("prophetkv_store_evictions", "Caches that had to make room.", value=stats.evictions)
    yield CounterMetricFamily(
        "prophetkv_store_failed_writes", "Caches that could not be written.", value=stats.failed_writes
    )
