"""Tables of a quality grid: per arm, pooled and per task, each against full prefill and against one strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from prophetkv_rag.evaluation.quality.fidelity import Arm
from prophetkv_rag.evaluation.quality.intervals import bootstrap_mean
from prophetkv_rag.evaluation.quality.results import FULL, QualityRow

POOLED = "all"


def summarise(rows: Sequence[QualityRow], *, against: str = "prophetkv") -> list[dict[str, Any]]:
    """Return one entry per task and arm, the pooled ones (task `"all"`) first.

    An entry holds the means with bootstrap intervals; `kl_above` is the paired difference in KL to the arm of strategy
    `against` at the same ratio (plain reuse is compared with its smallest), example by example, and `score_lost` the
    paired difference of full prefill's score to the arm's own.
    """
    by_arm: dict[Arm, dict[tuple[str, str], QualityRow]] = {}
    for row in rows:
        arm = Arm(row.strategy, row.recompute_ratio)
        by_arm.setdefault(arm, {})[row.task, row.example_id] = row
    full = {key: row for arm, found in by_arm.items() if arm.strategy == FULL for key, row in found.items()}
    ratios = sorted(arm.recompute_ratio for arm in by_arm if arm.strategy == against)

    def reference_of(arm: Arm) -> dict[tuple[str, str], QualityRow]:
        ratio = arm.recompute_ratio or next(iter(ratios), 0.0)
        return by_arm.get(Arm(against, ratio), {})

    tasks = [POOLED, *dict.fromkeys(row.task for row in rows)]
    return [
        _entry(task, arm, found, full, reference_of(arm), against)
        for task in tasks
        for arm, all_found in by_arm.items()
        if (found := {key: row for key, row in all_found.items() if task in (POOLED, key[0])})
    ]


def _entry(
    task: str,
    arm: Arm,
    found: dict[tuple[str, str], QualityRow],
    full: dict[tuple[str, str], QualityRow],
    reference: dict[tuple[str, str], QualityRow],
    against: str,
) -> dict[str, Any]:
    recalls = [row.attended_recall for row in found.values() if row.attended_recall is not None]
    entry: dict[str, Any] = {
        "task": task,
        "strategy": arm.strategy,
        "recompute_ratio": arm.recompute_ratio,
        "charged_ratio": float(np.mean([row.charged_ratio for row in found.values()])),
        "examples": len(found),
        "kl": asdict(bootstrap_mean([row.kl for row in found.values()])),
        "top1_agreement": float(np.mean([row.top1_agreement for row in found.values()])),
        "attended_recall": float(np.mean(recalls)) if recalls else None,
        "score": asdict(bootstrap_mean([row.score for row in found.values()])),
        "score_lost": asdict(bootstrap_mean([full[key].score - row.score for key, row in found.items()])),
        "ttft_ratio": float(np.median([full[key].ttft_s / row.ttft_s for key, row in found.items()])),
    }
    shared = [key for key in found if key in reference]
    if shared and arm.strategy not in (against, FULL):
        entry["against"] = against
        entry["kl_above"] = asdict(bootstrap_mean([found[key].kl - reference[key].kl for key in shared]))
        base = float(np.mean([reference[key].kl for key in shared]))
        entry["kl_change"] = float(np.mean([found[key].kl for key in shared])) / base - 1 if base else None
    return entry


HEADER = (
    "strategy",
    "ratio",
    "charged",
    "n",
    "KL (95%)",
    "KL above {against}, paired (95%)",
    "same top token",
    "attended recall",
    "score",
    "score lost, paired (95%)",
)


def table_rows(summary: Sequence[dict[str, Any]], task: str) -> list[tuple[str, ...]]:
    """Return one task's table as text cells, in the order of `HEADER`."""
    rows: list[tuple[str, ...]] = []
    for entry in summary:
        if entry["task"] != task:
            continue
        above = entry.get("kl_above")
        recall = entry["attended_recall"]
        rows.append(
            (
                entry["strategy"],
                f"{entry['recompute_ratio']:.0%}",
                f"{entry['charged_ratio']:.1%}",
                str(entry["examples"]),
                _interval(entry["kl"]),
                "-" if above is None else _interval(above, signed=True),
                f"{entry['top1_agreement']:.1%}",
                "-" if recall is None else f"{recall:.0%}",
                f"{100 * entry['score']['mean']:.1f}",
                _interval(entry["score_lost"], signed=True, factor=100),
            )
        )
    return rows


def markdown(summary: Sequence[dict[str, Any]], conditions: dict[str, Any], *, against: str = "prophetkv") -> str:
    """Return all tables as Markdown, with the conditions they were measured under."""
    header = [name.format(against=against) for name in HEADER]
    lines = [f"Conditions: {', '.join(f'{key} {value}' for key, value in conditions.items())}.", ""]
    for task in dict.fromkeys(entry["task"] for entry in summary):
        lines += [f"### {'All tasks pooled' if task == POOLED else task}", ""]
        lines += ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        lines += ["| " + " | ".join(cells) + " |" for cells in table_rows(summary, task)]
        lines.append("")
    return "\n".join(lines)


def _interval(interval: dict[str, float], *, signed: bool = False, factor: float = 1.0) -> str:
    digits = 3 if factor == 1.0 else 1
    sign = "+" if signed else ""
    mean, low, high = (factor * interval[name] for name in ("mean", "low", "high"))
    return f"{mean:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"
