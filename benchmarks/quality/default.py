"""Prints how close the default comes beside the paper's recipe at 20%, from the rows beside this file.

    python benchmarks/quality/default.py

No model is needed. The paper's rows are those of the first grids (`smollm2.jsonl.gz`, `qwen05.jsonl.gz`): the same
prompts, measured earlier; `*-default.jsonl.gz` measured it again on SmolLM2's, with the same numbers.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prophetkv_rag.evaluation.quality import bootstrap_mean

Row = dict[str, Any]
Prompt = tuple[str, str]
FULL, PAPER = ("full_prefill", 1.0), ("prophetkv", 0.2)
PREVIOUS, NEIGHBOURS = (f"prophetkv:first_chunk=exact@prompt+{kind}" for kind in ("previous:2", "neighbours:3"))
GROUPS: dict[str, Callable[[str], bool]] = {
    "RULER": lambda task: task.startswith("ruler"),
    "question files": lambda task: not task.startswith(("ruler", "longbench")),
    "LongBench": lambda task: task.startswith("longbench"),
}


def rows_of(name: str) -> dict[tuple[Prompt, tuple[str, float]], Row]:
    """Return the rows of a file here, by prompt and arm."""
    text = gzip.decompress((Path(__file__).parent / f"{name}.jsonl.gz").read_bytes()).decode()
    rows = [json.loads(line) for line in text.splitlines()[1:]]
    return {((row["task"], row["example_id"]), (row["strategy"], row["recompute_ratio"])): row for row in rows}


def main() -> None:
    """Print one table a model."""
    for model in ("smollm2", "qwen05"):
        measured = rows_of(f"{model}-default") | rows_of(f"{model}-longbench")
        rows = rows_of(model) | measured
        sys.stdout.write(f"\n{model}: KL, charged, same top token, score (full prefill's); paired with the paper's\n")
        for group, is_of in GROUPS.items():
            for arm in [
                (PAPER[0], 0.05),
                PAPER,
                *((kind, ratio) for kind in (PREVIOUS, NEIGHBOURS) for ratio in (0.05, 0.1, 0.2)),
            ]:
                prompts = [
                    prompt
                    for prompt, found in rows
                    if found == arm and is_of(prompt[0]) and (prompt, PAPER) in rows and (prompt, FULL) in measured
                ]
                if prompts:
                    sys.stdout.write(f"  {group:15}{arm[0]:52}{arm[1]:5.0%} {_line(rows, prompts, arm)}\n")
        arms = "the paper at 20%; the default, 5%; neighbours, 5% (where measured); full prefill"
        sys.stdout.write(f"  KL, score of each task (prompts): {arms}\n")
        for task in sorted({task for (task, _), _ in measured}):
            found = {
                arm: [
                    rows[prompt, arm]
                    for prompt, other in measured
                    if other == FULL and prompt[0] == task and (prompt, arm) in rows
                ]
                for arm in (PAPER, (PREVIOUS, 0.05), (NEIGHBOURS, 0.05), FULL)
            }
            cells = [
                f"{sum(row['kl'] for row in of) / len(of):.3f}, {100 * sum(row['score'] for row in of) / len(of):.1f}"
                for of in found.values()
                if of
            ]
            sys.stdout.write(f"    {task} ({len(found[FULL])}): {'; '.join(cells)}\n")
    _print_whole_answers()


def _print_whole_answers() -> None:
    """Print the scores of whole answers of tasks that are weak above."""
    rows = rows_of("smollm2-scores") | rows_of("smollm2-lcc")
    sys.stdout.write("\nsmollm2, whole answers: score (full prefill's), paired; KL\n")
    for task, arm in sorted({(task, arm) for (task, _), arm in rows if arm != FULL}):
        prompts = [prompt for prompt, other in rows if other == arm and prompt[0] == task]
        ours, full = ([100 * rows[prompt, of]["score"] for prompt in prompts] for of in (arm, FULL))
        found = bootstrap_mean([one - other for one, other in zip(ours, full, strict=True)])
        kl = sum(rows[prompt, arm]["kl"] for prompt in prompts) / len(prompts)
        sys.stdout.write(
            f"  {task} ({len(prompts)}) {arm[1]:4.0%} {sum(ours) / len(ours):5.1f} ({sum(full) / len(full):.1f})  "
            f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f}); {kl:.3f}\n"
        )


def _line(rows: dict[tuple[Prompt, tuple[str, float]], Row], prompts: list[Prompt], arm: tuple[str, float]) -> str:
    def mean(key: str, of: tuple[str, float] = arm) -> float:
        return sum(rows[prompt, of][key] for prompt in prompts) / len(prompts)

    pairs = [rows[prompt, arm]["kl"] - rows[prompt, PAPER]["kl"] for prompt in prompts]
    found, lower = bootstrap_mean(pairs), sum(pair < 0 for pair in pairs)
    return (
        f"{mean('kl'):.3f} {mean('charged_ratio'):6.1%} {mean('top1_agreement'):6.1%} "
        f"{100 * mean('score'):5.1f} ({100 * mean('score', FULL):.1f})  "
        f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}), lower on {lower} of {len(pairs)}"
    )


if __name__ == "__main__":
    main()
