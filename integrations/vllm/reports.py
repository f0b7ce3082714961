"""What an answer's `kv_transfer_params` say, as the report that our engine gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prophetkv_rag.prompt import PromptLayout
from prophetkv_rag.report import ChunkReport, ReuseReport, Timings


def report_of(
    layout: PromptLayout, said: Mapping[str, Any] | None, *, ttft_s: float, num_cached: int = 0
) -> ReuseReport:
    """Return a request's report.

    Args:
        layout: The prompt.
        said: `None` while nothing is known, and for a prefill of vLLM's own.
        ttft_s: Until the first token.
        num_cached: Tokens of such a prefill that vLLM had in its prefix cache.
    """
    timings = Timings(ttft=ttft_s)
    if said is None or said.get("status") not in ("reused", "prefix_cache"):
        num_held = num_cached if said is None else said.get("remembered_tokens", 0)
        new = [max(0, chunk.stop - max(chunk.start, num_held)) for chunk in layout.chunks]
        return ReuseReport(
            strategy="full_prefill",
            recompute_ratio=1.0,
            prompt_tokens=layout.num_tokens,
            chunk_tokens=sum(new),
            reused_tokens=0,
            recomputed_tokens=sum(new),
            fresh_tokens=layout.num_tokens - num_held - sum(new),
            remembered_tokens=num_held,
            charged_ratio=1.0,
            chunks=[ChunkReport(chunk.key, len(chunk.input_ids), "unused") for chunk in layout.chunks],
            timings_s=timings,
        )
    found = said["chunks"]
    return ReuseReport(
        strategy=said["strategy"],
        recompute_ratio=said["recompute_ratio"],
        prompt_tokens=said["prompt_tokens"],
        chunk_tokens=said["chunk_tokens"],
        reused_tokens=said["reused_tokens"],
        recomputed_tokens=said["recomputed_tokens"],
        fresh_tokens=said["prompt_tokens"] - said["chunk_tokens"] - said["remembered_tokens"],
        remembered_tokens=said["remembered_tokens"],
        row_layers=said["row_layers"],
        charged_ratio=said["charged_ratio"],
        chunks=[
            ChunkReport(
                chunk["key"],
                chunk["stop"] - chunk["start"],
                chunk["status"],
                "computed" if chunk["status"] == "miss" else "",
                chunk["behind"],
            )
            for chunk in found
        ],
        timings_s=timings,
    )
