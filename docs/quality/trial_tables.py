"""The tables of trials.py, made of the rows that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prophetkv_rag.evaluation.intervals import bootstrap_mean

RATIOS = (0.1, 0.2)
FLAT = {0.1: (0.05, 0.15), 0.2: (0.1, 0.3)}
"""A flat ratio, and the two that a rule may choose between."""

BASE = "prophetkv"


def compared(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of all arms, pooled, each against `prophetkv` at the same ratio."""
    kl: dict[tuple[str, float], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rows:
        kl.setdefault((row["arm"], row["ratio"]), {})[row["task"], row["id"]] = row
    yield "| arm | ratio | charged | n | KL | base | change | paired difference (95%) | lower on | same top token |"
    yield "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|"
    for (arm, ratio), found in sorted(kl.items(), key=lambda item: (item[0][1], item[0][0] != BASE)):
        base = kl[BASE, ratio if ratio in RATIOS else RATIOS[0]]
        own = np.array([found[key]["kl"] for key in found])
        other = np.array([base[key]["kl"] for key in found])
        above = bootstrap_mean((own - other).tolist())
        yield (
            f"| {arm} | {ratio:.0%} | {np.mean([row['charged'] for row in found.values()]):.1%} | {len(found)} "
            f"| {own.mean():.4f} | {other.mean():.4f} | {own.mean() / other.mean() - 1:+.0%} "
            f"| {above.mean:+.4f} ({above.low:+.4f} to {above.high:+.4f}) | {(own < other).sum()} "
            f"| {np.mean([row['top1'] for row in found.values()]):.1%} |"
        )


def features(work: Path, key: tuple[str, str], by_arm: dict[tuple[str, float], dict[str, Any]]) -> dict[str, float]:
    """Return what is known of a prompt before its answer begins."""
    mass = np.load(work / f"{key[0]}-{key[1]}.npz")["mass"].astype(np.float64)
    per_layer = mass.mean(1)
    scores = per_layer.mean(0)
    order = np.sort(scores)[::-1]
    tenth = len(scores) // 10
    agree = [len(set(np.argsort(-one)[:tenth]) & set(np.argsort(-scores)[:tenth])) / tenth for one in per_layer]
    found = {
        "entropy of the scores": float(-(scores * np.log(scores + 1e-12)).sum()),
        "mass outside the top 10%": float(1 - order[:tenth].sum()),
        "mass outside the top 20%": float(1 - order[: 2 * tenth].sum()),
        "disagreement of the layers": float(1 - np.mean(agree)),
        "doubt of plain reuse (entropy of its next token)": by_arm["full_reuse", 0.0]["doubt"],
    }
    for ratio in (0.05, *RATIOS):
        found[f"shift of the next token, 0 to {ratio:.0%}"] = by_arm[BASE, ratio]["shift"]
        found[f"doubt at {ratio:.0%} (entropy of its next token)"] = by_arm[BASE, ratio]["doubt"]
    for ratio in RATIOS:
        found[f"tokens that round two changes, {ratio:.0%}"] = by_arm["two rounds, joined", ratio]["changed"]
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    """Return mean ranks, ties shared."""
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return the rank correlation; 0 where one side is constant."""
    a, b = ranks(first), ranks(second)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def adaptive(work: Path, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield trial d's table."""
    prompts: dict[tuple[str, str], dict[tuple[str, float], dict[str, Any]]] = {}
    for row in rows:
        prompts.setdefault((row["task"], row["id"]), {})[row["arm"], row["ratio"]] = row
    needed = [(BASE, ratio) for ratio in sorted({*RATIOS, *sum(FLAT.values(), ())})]
    prompts = {key: arms for key, arms in prompts.items() if all(one in arms for one in needed)}
    known = [features(work, key, arms) for key, arms in prompts.items()]
    kl = {ratio: np.array([arms[BASE, ratio]["kl"] for arms in prompts.values()]) for _, ratio in needed}
    tasks = np.array([task for task, _ in prompts])
    yield f"{len(prompts)} prompts. Rank correlation with KL (within tasks); the rule against the flat ratio."
    yield ""
    header = [f"rule {low:.0%}/{high:.0%} - flat {flat:.0%}, paired (95%)" for flat, (low, high) in FLAT.items()]
    yield "| known | " + " | ".join([*(f"KL at {ratio:.0%}" for ratio in RATIOS), *header]) + " |"
    yield "|---|" + "---:|" * (len(RATIOS) + len(FLAT))
    values = {name: np.array([one[name] for one in known]) for name in known[0]}
    for name, value in values.items():
        correlations = []
        for ratio in RATIOS:
            inside = np.mean([spearman(value[tasks == t], kl[ratio][tasks == t]) for t in dict.fromkeys(tasks)])
            correlations.append(f"{spearman(value, kl[ratio]):+.2f} ({inside:+.2f})")
        yield f"| {name} | " + " | ".join([*correlations, *(_rule(kl, flat, value) for flat in FLAT)]) + " |"
    best = [_rule(kl, flat, kl[low] - kl[high]) for flat, (low, high) in FLAT.items()]
    yield "| (the gain itself: the best such rule) | " + " | ".join(["-"] * len(RATIOS) + best) + " |"
    cost = [kl[low] / 2 + kl[high] / 2 - kl[flat] for flat, (low, high) in FLAT.items()]
    yield "| (a coin) | " + " | ".join(["-"] * len(RATIOS) + [_interval(one) for one in cost]) + " |"


def _rule(kl: dict[float, np.ndarray], flat: float, value: np.ndarray) -> str:
    low, high = FLAT[flat]
    order = np.argsort(np.argsort(value, kind="stable"), kind="stable")
    return _interval(np.where(order >= len(value) // 2, kl[high], kl[low]) - kl[flat])


def _interval(differences: np.ndarray) -> str:
    found = bootstrap_mean(differences.tolist())
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
