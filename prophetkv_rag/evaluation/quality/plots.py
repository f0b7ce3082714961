"""Pictures of a quality grid. Needs matplotlib: `pip install "prophetkv-rag[bench]"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prophetkv_rag.evaluation.plotting import colours_of, load_pyplot
from prophetkv_rag.evaluation.quality.results import FULL
from prophetkv_rag.evaluation.quality.tables import POOLED


def _strategies(summary: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(entry["strategy"] for entry in summary if entry["strategy"] != FULL))


def plot_against_budget(summary: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw KL and score, pooled over the tasks, against the budget really charged, one line per strategy."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    colours = colours_of(_strategies(summary))
    pooled = [entry for entry in summary if entry["task"] == POOLED]
    for name, colour in colours.items():
        entries = sorted((e for e in pooled if e["strategy"] == name), key=lambda e: e["charged_ratio"])
        budget = [100 * entry["charged_ratio"] for entry in entries]
        for axis, measure, factor in ((left, "kl", 1.0), (right, "score", 100.0)):
            mean = factor * np.array([entry[measure]["mean"] for entry in entries])
            low = factor * np.array([entry[measure]["low"] for entry in entries])
            high = factor * np.array([entry[measure]["high"] for entry in entries])
            spread = np.maximum(0, [mean - low, high - mean])
            axis.errorbar(budget, mean, yerr=spread, marker="o", capsize=3, color=colour, label=name)
    full = next((entry for entry in pooled if entry["strategy"] == FULL), None)
    if full is not None:
        right.axhline(100 * full["score"]["mean"], color="black", linestyle="--", linewidth=1, label="full prefill")
    xlabel = "charged budget, % of full prefill's rows x layers on the chunks"
    left.set(xlabel=xlabel, ylabel="KL to full prefill, nats", ylim=(0, None))
    right.set(xlabel=xlabel, ylabel="official score", ylim=(0, None))
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_tasks(summary: Sequence[dict[str, Any]], path: Path, *, recompute_ratio: float) -> None:
    """Draw the KL of every strategy per task, at one nominal ratio (ratio 0 stands beside it)."""
    pyplot = load_pyplot()
    tasks = [task for task in dict.fromkeys(entry["task"] for entry in summary) if task != POOLED]
    colours = colours_of(_strategies(summary))
    chosen = {
        (entry["task"], entry["strategy"]): entry
        for entry in summary
        if entry["recompute_ratio"] in (0.0, recompute_ratio)
    }
    names = [name for name in colours if any(strategy == name for _, strategy in chosen)]
    figure, axis = pyplot.subplots(figsize=(max(7, 1.5 * len(tasks)), 4.6), layout="constrained")
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        found = [(place, chosen[task, name]["kl"]) for place, task in enumerate(tasks) if (task, name) in chosen]
        places = [place - 0.4 + width * (index + 0.5) for place, _ in found]
        means = np.array([kl["mean"] for _, kl in found])
        spread = np.maximum(0, [means - [kl["low"] for _, kl in found], [kl["high"] for _, kl in found] - means])
        axis.bar(places, means, width, yerr=spread, color=colours[name], label=name, error_kw={"linewidth": 0.7})
    axis.set_xticks(range(len(tasks)), [task.removeprefix("ruler_") for task in tasks], rotation=20, ha="right")
    axis.set_ylabel(f"KL to full prefill at {recompute_ratio:.0%}, nats")
    axis.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_picks(
    picks: Mapping[str, Sequence[int]], chunk_spans: Sequence[tuple[int, int]], path: Path, *, title: str
) -> None:
    """Draw which context tokens each strategy recomputes on one prompt, beside what full prefill attends to.

    Args:
        picks: Positions per strategy; the first is the yardstick (full prefill's most attended tokens).
        chunk_spans: First and last position (exclusive) of every chunk.
        path: The picture.
        title: Says which prompt it is.
    """
    pyplot = load_pyplot()
    start, stop = chunk_spans[0][0], chunk_spans[-1][1]
    bins = min(200, stop - start)
    edges = np.linspace(start, stop, bins + 1)
    density = np.stack([np.histogram(list(positions), edges)[0] / np.diff(edges) for positions in picks.values()])
    figure, axis = pyplot.subplots(figsize=(12, 0.45 * len(picks) + 1.6), layout="constrained")
    image = axis.imshow(
        density, aspect="auto", cmap="magma", vmin=0, vmax=1, extent=(start, stop, len(picks), 0), interpolation="none"
    )
    for first, _ in chunk_spans[1:]:
        axis.axvline(first, color="white", linewidth=0.6, alpha=0.6)
    axis.set_yticks(np.arange(len(picks)) + 0.5, list(picks))
    axis.set(xlabel="position in the prompt (white: chunk borders)", title=title)
    figure.colorbar(image, ax=axis, label="share recomputed")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
