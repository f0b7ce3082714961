"""Prints the paired differences that docs/quality.md and results.md quote, from the rows beside this file.

    python benchmarks/quality/paired.py

No model is needed.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from prophetkv_rag.evaluation.quality import bootstrap_mean

Arms = dict[tuple[str, float], float]
"""KL by strategy and ratio."""

OURS, PAPER = "prophetkv@prompt+corpus", "prophetkv"
SETS = {"all": (), "without vt and cwe": ("ruler_vt", "ruler_cwe")}
PAIRS = [((arm, ratio), (PAPER, ratio)) for ratio in (0.1, 0.2) for arm in (OURS, f"{PAPER}@corpus", f"{PAPER}@prompt")]
PAIRS += [((OURS, ratio), (f"{PAPER}@corpus", ratio)) for ratio in (0.1, 0.2)] + [((OURS, 0.1), (PAPER, 0.2))]
RIVALS = ("epic", "cacheblend", "kvshare", "random")
PAIRS += [((rival, ratio), (PAPER, ratio)) for ratio in (0.1, 0.2) for rival in RIVALS]
PAIRS += [((rival, 0.2), (PAPER, 0.1)) for rival in RIVALS]  # at a higher charge than what they are compared with
PAIRS += [
    ((f"prophetkv_late{encoding}", ratio), (f"{PAPER}{encoding}", ratio))
    for encoding in ("", "@prompt+corpus")
    for ratio in (0.1, 0.2)
]
LAYERS = ("infoflow", "fusionrag", "prophetkv_late:start=0.3,stop=0.75")
PAIRS += [((other, ratio), (PAPER, ratio)) for ratio in (0.1, 0.2) for other in LAYERS]
PAIRS += [
    ((f"prophetkv:context_share={share}{encoding}", ratio), (f"{PAPER}{encoding}", ratio))
    for share in ("0.5", "0.25", "0")
    for encoding in ("", "@prompt+corpus")
    for ratio in (0.1, 0.2)
]


def tasks_of(kl: dict[tuple[str, str], Arms], examples: list[Arms]) -> list[str]:
    """Return the task of each example."""
    task_of = {id(arms): task for (task, _), arms in kl.items()}
    return [task_of[id(arms)] for arms in examples]


def compared(pairs: list[tuple[float, float]]) -> str:
    """Return how much lower the first of each pair is."""
    differences = [one - other for one, other in pairs]
    found = bootstrap_mean(differences)
    change = sum(differences) / sum(other for _, other in pairs)
    lower = sum(difference < 0 for difference in differences)
    return f"{change:+.0%}  {found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}), lower on {lower} of {len(pairs)}"


for file in sorted(Path(__file__).parent.glob("*.jsonl.gz")):
    kl: dict[tuple[str, str], Arms] = defaultdict(dict)
    for line in gzip.decompress(file.read_bytes()).decode().splitlines()[1:]:
        row = json.loads(line)
        kl[row["task"], row["example_id"]][row["strategy"], row["recompute_ratio"]] = row["kl"]
    sets = {name: [arms for (task, _), arms in kl.items() if task not in left_out] for name, left_out in SETS.items()}
    sets["question files"] = [arms for (task, _), arms in kl.items() if not task.startswith("ruler_")]
    for name, examples in sets.items():
        if name != "all" and len(examples) in (0, len(kl)):
            continue  # said already
        sys.stdout.write(f"{file.stem.partition('.')[0]}, {name}: {len(examples)} prompts\n")
        for ours, base in PAIRS:
            both = [arms for arms in examples if ours in arms and base in arms]  # not all prompts have all arms
            if not both:
                continue
            label = f"{ours[0]} {ours[1]:.0%} against {base[0]} {base[1]:.0%}"
            sys.stdout.write(f"  {label:58} {compared([(arms[ours], arms[base]) for arms in both])}\n")
            by_task: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for task, arms in zip(tasks_of(kl, both), both, strict=True):
                by_task[task].append((arms[ours], arms[base]))
            if name == "all" and ours[0] == OURS and len(by_task) > 1:
                for task, of_task in by_task.items():
                    sys.stdout.write(f"  {'':58} {task}: {compared(of_task)}\n")
            if name == "all" and len(by_task) > 2:  # prompts of one task are alike, those of RULER share a haystack
                means = np.array([np.mean([one - other for one, other in of_task]) for of_task in by_task.values()])
                one_out = [float(np.delete(means, left).mean()) for left in range(len(means))]
                spread = bootstrap_mean(means.tolist())
                sys.stdout.write(
                    f"  {'':58} tasks as units: {spread.mean:+.3f} ({spread.low:+.3f} to {spread.high:+.3f}), "
                    f"lower in {(means < 0).sum()} of {len(means)}; "
                    f"without any one task {min(one_out):+.3f} to {max(one_out):+.3f}\n"
                )
