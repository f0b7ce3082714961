"""What a prefill cost and what it reused, in a report: counts, the charged ratio, each chunk, and the prompt's view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prophetkv_rag.chunks import Origin
from prophetkv_rag.prompt import PromptLayout
from prophetkv_rag.report import ChunkReport, PromptView, ReuseReport, Timings, ViewedChunk


def ends_with_chunk(layout: PromptLayout) -> bool:
    """Whether the prompt's last token is a chunk's: it is always computed, as its logits are needed."""
    return bool(layout.chunks) and layout.chunks[-1].stop == layout.num_tokens


def report_full_prefill(layout: PromptLayout, strategy: str, timings: Timings, *, num_layers: int) -> ReuseReport:
    """Report a prefill that computed every token."""
    return ReuseReport(
        strategy=strategy,
        recompute_ratio=1.0,
        prompt_tokens=layout.num_tokens,
        chunk_tokens=layout.num_chunk_tokens,
        reused_tokens=0,
        recomputed_tokens=layout.num_chunk_tokens,
        fresh_tokens=layout.num_tokens - layout.num_chunk_tokens,
        row_layers=layout.num_tokens * num_layers,
        charged_ratio=1.0,
        chunks=[ChunkReport(chunk.key, len(chunk.input_ids), "unused") for chunk in layout.chunks],
        timings_s=timings,
    )


def report_reuse(
    layout: PromptLayout,
    strategy: str,
    ratio: float,
    timings: Timings,
    origins: Sequence[Origin],
    *,
    num_recomputed: int,
    row_layers: int,
    num_layers: int,
    num_held: int = 0,
    num_held_recomputed: int = 0,
    attended_share: float = 1.0,
) -> ReuseReport:
    """Report a prefill that reused caches.

    Args:
        layout: The prompt.
        strategy: Name of the one that chose what was recomputed.
        ratio: Its budget.
        timings: Of the stages.
        origins: Where each chunk's cache came from; those that stand in rows taken over have none.
        num_recomputed: Chunk tokens that ran through every layer.
        row_layers: Rows x layers of all that ran, for choosing as well.
        num_layers: The model's.
        num_held: The prompt's first rows that were taken over from a former prompt.
        num_held_recomputed: Those of them that were recomputed.
        attended_share: See `attended_share`.
    """
    num_loaded = sum(span.stop - span.start for span in layout.spans if span.start >= num_held)
    num_fresh = layout.num_tokens - num_held - num_loaded
    unavoidable = (num_fresh - max(0, layout.known_prefix - num_held)) * num_layers
    held = [Origin("remembered", "")] * sum(chunk.start < num_held for chunk in layout.chunks)
    return ReuseReport(
        strategy=strategy,
        recompute_ratio=ratio,
        prompt_tokens=layout.num_tokens,
        chunk_tokens=num_loaded + num_held_recomputed,
        reused_tokens=num_loaded + num_held_recomputed - num_recomputed,
        recomputed_tokens=num_recomputed,
        fresh_tokens=num_fresh,
        remembered_tokens=num_held - num_held_recomputed,
        moved_tokens=sum(span.stop - span.start for span in layout.moved if span.start >= num_held),
        row_layers=row_layers,
        charged_ratio=(row_layers - unavoidable) / (max(1, layout.num_chunk_tokens) * num_layers),
        attended_share=attended_share,
        chunks=[
            ChunkReport(chunk.key, len(chunk.input_ids), *origin)
            for chunk, origin in zip(layout.chunks, [*held, *origins], strict=True)
        ],
        timings_s=timings,
    )


def attended_share(rows: torch.Tensor, is_chunk: torch.Tensor, visible: torch.Tensor) -> float:
    """Return the keys that stage II's rows see, as a share of those at or before their own positions.

    Args:
        rows: `[m]`, ascending positions of the rows.
        is_chunk: `[N]`, bool: rows of such positions see the visible keys only, all others everything.
        visible: `[N]`, bool.

    Sliding windows are left out of the count.
    """
    before = rows + 1
    seen = torch.where(is_chunk[rows], visible.cumsum(0)[rows], before)
    return float(seen.sum() / before.sum())


def attach_view(
    report: ReuseReport,
    layout: PromptLayout,
    recomputed: torch.Tensor,
    scores: torch.Tensor | None,
    tokenizer: Any,
    *,
    num_held: int = 0,
) -> None:
    """Keep copies of the few numbers that a view is made of; text is made of them when somebody looks.

    Args:
        report: Gets the view.
        layout: The prompt.
        recomputed: `[k]` ascending positions of chunk tokens that were computed.
        scores: `[N]` of stage I, or `None`.
        tokenizer: Makes the text.
        num_held: The prompt's first rows that were taken over from a former prompt.
    """
    rows = recomputed.cpu()
    if ends_with_chunk(layout):
        rows = torch.cat([rows, rows.new_tensor([layout.num_tokens - 1])])
    chunks = [
        ViewedChunk(chunk.key, chunk.start, chunk.stop, found.status)
        for chunk, found in zip(layout.chunks, report.chunks, strict=True)
    ]
    moved = [(span.start, span.stop) for span in layout.moved if span.start >= num_held]
    kept = None if scores is None else scores.cpu().numpy().copy()
    ids = layout.input_ids.numpy().copy()
    report.attach_view(PromptView(ids, chunks, kept, rows.numpy().copy(), tokenizer, num_held, moved))
