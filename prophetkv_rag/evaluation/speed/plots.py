"""Pictures of the speed bench. Needs matplotlib: `pip install "prophetkv-rag[bench]"`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prophetkv_rag.evaluation.plotting import colours_of, load_pyplot


def plot_ttft(rows: Sequence[dict[str, Any]], peers: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw how many times sooner the first token comes, against the context's length, with each arm's limit."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    arms = list(dict.fromkeys((row["strategy"], row["recompute_ratio"]) for row in rows))
    names = [name if ratio == 0 else f"{name} {ratio:.0%}" for name, ratio in arms]
    others = list(dict.fromkeys(row["peer"] for row in peers))
    colours = colours_of([*names, *others])
    for arm, name in zip(arms, names, strict=True):
        found = sorted(
            (row for row in rows if (row["strategy"], row["recompute_ratio"]) == arm), key=lambda r: r["context_tokens"]
        )
        at = [row["context_tokens"] for row in found]
        middle = np.array([row["speedup_ram"] for row in found])
        spread = [
            middle - [row["speedup_ram_min"] for row in found],
            np.array([row["speedup_ram_max"] for row in found]) - middle,
        ]
        axis.errorbar(at, middle, yerr=spread, marker="o", capsize=3, color=colours[name], label=name)
        axis.plot(at, [row["limit"] for row in found], linestyle=":", color=colours[name])
    for name in others:
        found = sorted((row for row in peers if row["peer"] == name), key=lambda r: r["context_tokens"])
        at = [row["context_tokens"] for row in found]
        axis.plot(at, [row["speedup"] for row in found], marker="s", linestyle="--", color=colours[name], label=name)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xlabel="context tokens", ylabel="times sooner than full prefill (SDPA)", yscale="log")
    low, high = axis.get_ylim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200) if low <= tick <= high]
    axis.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    figure.legend(title="dotted: arithmetic limit of the rows run", loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
