"""From a measured grid to a profile: the smallest ratio per strategy that keeps a wanted fidelity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prophetkv_rag.evaluation.quality.intervals import bootstrap_mean
from prophetkv_rag.evaluation.quality.results import FULL, QualityRow
from prophetkv_rag.evaluation.quality.tables import POOLED, summarise
from prophetkv_rag.profile import CalibratedStrategy, Profile
from prophetkv_rag.reuse import make_strategy


def calibrate(
    rows: Sequence[QualityRow],
    *,
    model: str,
    model_fingerprint: str,
    wanted_agreement: float,
    chunk_tokens: int = 0,
    answer_tokens: int = 0,
) -> Profile:
    """Return the profile of a grid's rows.

    A ratio counts only if every larger measured one keeps the agreement too: a lucky dip is no setting to run with.

    Args:
        rows: A grid over some strategies and ratios.
        model: Name of the model.
        model_fingerprint: Of its weights.
        wanted_agreement: Mean share of answer tokens that must agree with full prefill's.
        chunk_tokens: Size of the chunks that were measured.
        answer_tokens: Longest answer that was compared.
    """
    pooled = [entry for entry in summarise(rows) if entry["task"] == POOLED and entry["strategy"] != FULL]
    outcomes = []
    for strategy in dict.fromkeys(entry["strategy"] for entry in pooled):
        entries = sorted((e for e in pooled if e["strategy"] == strategy), key=lambda e: e["recompute_ratio"])
        chosen = None
        for entry in reversed(entries):
            if entry["top1_agreement"] < wanted_agreement:
                break
            chosen = entry
        outcomes.append(
            CalibratedStrategy(
                strategy=strategy,
                recompute_ratio=None if chosen is None else chosen["recompute_ratio"],
                charged_ratio=None if chosen is None else chosen["charged_ratio"],
                curve=tuple(
                    {
                        "recompute_ratio": entry["recompute_ratio"],
                        "charged_ratio": round(entry["charged_ratio"], 4),
                        "top1_agreement": round(entry["top1_agreement"], 4),
                        **_interval([row.top1_agreement for row in rows if _is_of(row, entry)]),
                        "kl": round(entry["kl"]["mean"], 5),
                    }
                    for entry in entries
                ),
            )
        )
    return Profile(
        model=model,
        model_fingerprint=model_fingerprint,
        wanted_agreement=wanted_agreement,
        examples=len({(row.task, row.example_id) for row in rows}),
        chunk_tokens=chunk_tokens,
        answer_tokens=answer_tokens,
        strategies=tuple(sorted(outcomes, key=_cost)),
    )


def _cost(one: CalibratedStrategy) -> tuple[bool, float, float, float]:
    """What is charged; at the same charge what recomputed tokens see, then how close it comes."""
    kl = next((point["kl"] for point in one.curve if point["recompute_ratio"] == one.recompute_ratio), 0.0)
    share = float(getattr(make_strategy(one.spec), "context_share", None) or 1.0)
    return one.recompute_ratio is None, one.charged_ratio or 0.0, share, kl


def _is_of(row: QualityRow, entry: Mapping[str, Any]) -> bool:
    return (row.strategy, row.recompute_ratio) == (entry["strategy"], entry["recompute_ratio"])


def _interval(agreements: Sequence[float]) -> dict[str, float]:
    found = bootstrap_mean(agreements)
    return {"top1_low": round(found.low, 4), "top1_high": round(found.high, 4)}
