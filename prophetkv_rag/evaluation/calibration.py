"""From a measured grid to a profile: the smallest ratio per strategy that keeps a wanted fidelity."""

from __future__ import annotations

from collections.abc import Sequence

from prophetkv_rag.evaluation.quality import FULL, QualityRow
from prophetkv_rag.evaluation.tables import POOLED, summarise
from prophetkv_rag.profile import CalibratedStrategy, Profile


def calibrate(rows: Sequence[QualityRow], *, model: str, model_fingerprint: str, wanted_agreement: float) -> Profile:
    """Return the profile of a grid's rows.

    A ratio counts only if every larger measured one keeps the agreement too: a lucky dip is no setting to run with.

    Args:
        rows: A grid over some strategies and ratios.
        model: Name of the model.
        model_fingerprint: Of its weights.
        wanted_agreement: Mean share of answer tokens that must agree with full prefill's.
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
        strategies=tuple(sorted(outcomes, key=lambda one: (one.charged_ratio is None, one.charged_ratio or 0.0))),
    )
