"""The connector with planted failures, for test_ranks.py: in the stages of requests whose ratio says so."""

from __future__ import annotations

from typing import Any

from prophetkv_rag.integrations.vllm import ProphetKVConnector, together

ON_ALL, ON_ONE = 0.11, 0.12
"""Recompute ratios of requests whose stages fail on all ranks, and on the second alone."""


class FailingConnector(ProphetKVConnector):
    """Fails on purpose."""

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """See vLLM."""
        super().register_kv_caches(kv_caches)
        together.PATIENCE_S = 3
        stages = self.stages
        fill = stages._fill

        def failing(queries: Any, identity: Any) -> None:
            ratios = {query.load.recompute_ratio for query in queries}
            if ON_ALL in ratios or (ON_ONE in ratios and stages._runner.rank == 1):
                raise MemoryError("planted")
            fill(queries, identity)

        stages._fill = failing
