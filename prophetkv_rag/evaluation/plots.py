"""Pictures of a quality grid. Needs matplotlib: `pip install "prophetkv-rag[bench]"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.results import FULL
from prophetkv_rag.evaluation.tables import POOLED


def load_pyplot() -> Any:
    """Return `matplotlib.pyplot`, set to draw into files; `InputError` if it is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        msg = "plots need matplotlib; install it with: pip install 'prophetkv-rag[bench]'"
        raise InputError(msg) from error
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _colours(strategies: Sequence[str]) -> dict[str, Any]:
    palette = load_pyplot().get_cmap("tab10" if len(strategies) <= 10 else "tab20")
    return {name: palette(index % palette.N) for index, name in enumerate(strategies)}


def _strategies(summary: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(entry["strategy"] for entry in summary if entry["strategy"] != FULL))


def plot_against_budget(summary: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw KL and score, pooled over the tasks, against the budget really charged, one line per strategy."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    colours = _colours(_strategies(summary))
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
    colours = _colours(_strategies(summary))
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


def plot_ttft(rows: Sequence[dict[str, Any]], peers: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw how many times sooner the first token comes, against the context's length, with each arm's limit."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    arms = list(dict.fromkeys((row["strategy"], row["recompute_ratio"]) for row in rows))
    names = [name if ratio == 0 else f"{name} {ratio:.0%}" for name, ratio in arms]
    others = list(dict.fromkeys(row["peer"] for row in peers))
    colours = _colours([*names, *others])
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
