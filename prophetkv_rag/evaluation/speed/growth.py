"""What one more token of context costs: the slope of the time to first token between neighbouring context lengths.

Full prefill's cost per token rises with the length, as every row sees more keys; a reused prefill's rises too, but only
the rows that are run see them. Both are told in time and, free of noise, in counted operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

TIMES = {"full_ms": "full_prefill_s", "ms": "ram_s"}
COUNTS = {"full_mflop": "full_flops", "mflop": "flops"}


def cost_per_token(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each arm's cost per extra context token, step by step.

    Args:
        rows: `TtftResult.to_dict` of at least two context lengths.

    Returns:
        Per arm and step, in ascending order: `from_tokens`, `to_tokens`; milliseconds per token of full prefill and of
        the arm (`full_ms`, `ms`, each from medians, with `_low` and `_high` from the rounds' extremes) and how many
        times less the arm's is (`times_less`); millions of operations per token (`full_mflop`, `mflop`); and, from the
        second step on, how much each rose since the step before, per 1,000 tokens (`..._rise`, else `None`).
    """
    found = []
    for arm in dict.fromkeys((row["strategy"], row["recompute_ratio"]) for row in rows):
        ours = sorted(
            (row for row in rows if (row["strategy"], row["recompute_ratio"]) == arm),
            key=lambda row: int(row["context_tokens"]),
        )
        before: dict[str, Any] | None = None
        for short, long in pairwise(ours):
            step = {"strategy": arm[0], "recompute_ratio": arm[1], **_step(short, long)}
            between = 0.0 if before is None else (step["to_tokens"] - before["from_tokens"]) / 2_000
            for name in (*TIMES, *COUNTS):
                step[f"{name}_rise"] = None if before is None else (step[name] - before[name]) / between
            found.append(step)
            before = step
    return found


def _step(short: dict[str, Any], long: dict[str, Any]) -> dict[str, Any]:
    first, last = short["context_tokens"], long["context_tokens"]
    step: dict[str, Any] = {"from_tokens": first, "to_tokens": last}
    for name, seconds in TIMES.items():
        step[name] = 1e3 * (long[seconds] - short[seconds]) / (last - first)
        step[f"{name}_low"] = 1e3 * (long[f"{seconds}_min"] - short[f"{seconds}_max"]) / (last - first)
        step[f"{name}_high"] = 1e3 * (long[f"{seconds}_max"] - short[f"{seconds}_min"]) / (last - first)
    step["times_less"] = step["full_ms"] / step["ms"] if step["ms"] > 0 else None
    for name, count in COUNTS.items():
        step[name] = 1e-6 * (long[count] - short[count]) / (last - first)
    return step
