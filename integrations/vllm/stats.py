"""Counters in vLLM's own log and Prometheus metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "requests": "Requests filled from chunk caches.",
    "chunk_tokens": "Tokens of known chunks in them.",
    "reused_tokens": "Those of them that were not computed again.",
    "recomputed_tokens": "Those of them that were.",
    "remembered_tokens": "Tokens of prompts with known chunks that came from a former turn.",
    "failed_requests": "Requests left to vLLM because a cache was missing or bad.",
    "too_long": "Requests left to vLLM because they have more rows than a step may run.",
    "encoded_chunks": "Chunks encoded and stored.",
    "second_caches": "Second caches, of chunks that came first in a prompt, encoded and stored.",
    "read_ahead_waits": "Requests that waited for their caches to be read into RAM.",
    "read_ahead_seconds": "How long they waited, summed.",
    "read_ahead_late": "Those of them that were filled although not all was read in time.",
    "stage_seconds": "Time that steps spent in stage I and II, summed over their requests.",
}


@dataclass
class ProphetKVStats(KVConnectorStats):
    """Counts since the last look."""

    def reset(self) -> None:
        """Begin anew."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> ProphetKVStats:
        """Add another one's counts."""
        names = {**self.data, **other.data}
        return ProphetKVStats({name: self.data.get(name, 0) + other.data.get(name, 0) for name in names})

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's log says."""
        return {f"prophetkv {name}": round(value, 3) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data


class ProphetKVPromMetrics(KVConnectorPromMetrics):
    """`vllm:prophetkv_*_total`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(name=f"vllm:prophetkv_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add counts."""
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name].labels(*self.per_engine_labelvalues[engine_idx]).inc(value)
