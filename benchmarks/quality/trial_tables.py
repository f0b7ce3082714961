"""Prints the tables of trials.py, of the rows that it keeps.

    python benchmarks/quality/trial_tables.py         # of those in trials/, beside this file
    python benchmarks/quality/trial_tables.py WORK

No model is needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prophetkv_rag.evaluation.quality import bootstrap_mean

RATIOS = (0.1, 0.2)
BASE = "prophetkv"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, none if there is no such file; a last line that was cut off is left out."""
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


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


def ranks(values: np.ndarray) -> np.ndarray:
    """Return mean ranks, ties shared."""
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return the rank correlation; 0 where one side is constant."""
    a, b = ranks(first), ranks(second)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def adaptive(prompts: list[dict[str, Any]]) -> Iterator[str]:
    """Yield trial d's table; every prompt has its task, what is known of it (`looks`) and its `kl` by ratio."""
    if not prompts:
        return
    tasks = np.array([one["task"] for one in prompts])
    kl = {ratio: np.array([one["kl"][f"{ratio:.0%}"] for one in prompts]) for ratio in (0.0, *RATIOS)}
    gain = kl[0.0] - kl[0.2]
    values = {name: np.array([one["looks"][name] for one in prompts]) for name in prompts[0]["looks"]}
    means = ", ".join(f"{one.mean():.3f} at {ratio:.0%}" for ratio, one in kl.items())
    yield f"{len(prompts)} prompts; mean KL {means}."
    yield "Rank correlations over all prompts (mean of those within each task)."
    yield ""
    yield "| known | KL at 0% | KL at 10% | KL at 20% | gain, 0% to 20% | rule 0%/20% - flat 10%, paired (95%) |"
    yield "|---|---:|---:|---:|---:|---|"
    for name, value in values.items():
        cells = []
        for wanted in (*kl.values(), gain):
            inside = np.mean([spearman(value[tasks == t], wanted[tasks == t]) for t in dict.fromkeys(tasks)])
            cells.append(f"{spearman(value, wanted):+.2f} ({inside:+.2f})")
        yield f"| {name} | " + " | ".join([*cells, _rule(kl, value)]) + " |"
    yield f"| (the gain itself: the best such rule) | - | - | - | - | {_rule(kl, gain)} |"
    yield f"| (a coin) | - | - | - | - | {_interval((kl[0.0] + kl[0.2]) / 2 - kl[0.1])} |"


def _rule(kl: dict[float, np.ndarray], value: np.ndarray) -> str:
    order = np.argsort(np.argsort(value, kind="stable"), kind="stable")
    return _interval(np.where(order >= len(value) // 2, kl[0.2], kl[0.0]) - kl[0.1])


def _interval(differences: np.ndarray) -> str:
    found = bootstrap_mean(differences.tolist())
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def main() -> None:
    """Print the tables of every model and encoding below a folder."""
    work = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "trials"
    for folder in sorted(path for path in work.iterdir() if path.is_dir()):
        rows, looks = read_lines(folder / "rows.jsonl"), read_lines(folder / "looks.jsonl")
        for line in [f"### {folder.name}", "", *compared(rows), "", *adaptive(looks), ""]:
            sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
