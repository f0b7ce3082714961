"""Prints where the seconds of a query go, by kind of operation, beside full prefill's of the same prompt.

    python benchmarks/performance/profile_query.py 4096 0.2            # the table (medians over rounds, alternating)
    pip install --no-deps --target OTHER OTHER_CHECKOUT                # another version, beside this one:
    PYTHONPATH=OTHER python benchmarks/performance/profile_query.py 4096 0.2
    python benchmarks/performance/profile_query.py 4096 0.2 --flame docs/images/flame-query.svg   # the picture

A version whose modules did not lie in folders yet needs this script as it was then (`git log --follow` of this file),
which also ran on the first version.

The picture is of queries alone, not of what comes before them: py-spy (pip install py-spy) is started beside them and
needs the right to look into another process (root, or kernel.yama.ptrace_scope=0). A width is a share of samples, which
also holds on a machine that does other things. Names only: no path of the machine that drew it is left in the file.

Operations are those of torch's profiler (self CPU time of the calling
thread, which waits for the others); what is left of the wall-clock time is Python and the dispatcher.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import prophetkv_rag
from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.evaluation.speed import corpus_prompt
from prophetkv_rag.model import load_model

KINDS = {
    "matrix products": ("mm", "addmm", "bmm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu", "_softmax"),
    "copies": ("copy_", "cat", "index", "index_copy_", "index_put_", "_index_put_impl_", "clone", "contiguous"),
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("context", type=int, nargs="?", default=4096)
parser.add_argument("ratio", type=float, nargs="?", default=0.2)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--flame", type=Path, metavar="FILE.svg", help="draw a flame graph of queries instead of the table")
args = parser.parse_args()

model, tokenizer = load_model(fetch_default_model())
engine = ProphetKVEngine(model, tokenizer)
prompt = corpus_prompt(engine, args.context, 256)
engine.add_chunks(prompt.chunks)
ARMS = {"full_prefill": 1.0, "prophetkv": args.ratio}


def draw_flame(path: Path) -> None:
    """Sample `args.rounds` queries, after one that warms up."""
    engine.prefill(prompt, strategy="prophetkv", recompute_ratio=args.ratio)
    command = ["py-spy", "record", "--function", "--rate", "200", "--output", path, "--pid", str(os.getpid())]
    with subprocess.Popen(command) as sampler:
        for _ in range(args.rounds):
            engine.prefill(prompt, strategy="prophetkv", recompute_ratio=args.ratio)
        sampler.send_signal(signal.SIGINT)
    if sampler.returncode != 0:
        sys.exit("py-spy failed, see above")
    title = f"Queries over {args.context} context tokens, {args.ratio:.0%} recomputed: share of samples"
    drawn = re.sub(r"py-spy record[^<]*", title, path.read_text("utf-8"))
    # Frames of packages are named from the package on; what is left are the script's and the interpreter's own.
    path.write_text(re.sub(r"\((/[^)<]*/)([^)/<]*)\)", r"(\2)", drawn), "utf-8")


if args.flame is not None:
    draw_flame(args.flame)
    sys.exit()

found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
for number in range(args.rounds + 1):
    for arm, ratio in ARMS.items():
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            started = time.perf_counter()
            engine.prefill(prompt, strategy=arm, recompute_ratio=ratio)
            seconds = {"total": time.perf_counter() - started}
        for event in profiler.key_averages():
            name = event.key.removeprefix("aten::")
            kind = next((kind for kind, names in KINDS.items() if name in names), "other operations")
            seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
        seconds["Python and dispatch"] = seconds["total"] - sum(seconds[k] for k in seconds if k != "total")
        if number:  # the first round warms up
            found[arm].append(seconds)

version = f"{prophetkv_rag.__file__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
sys.stdout.write(f"{args.context} context tokens, {args.ratio:.0%}, {args.rounds} rounds; {version}\n\n")
kinds = [*KINDS, "other operations", "Python and dispatch", "total"]
sys.stdout.write("| seconds | " + " | ".join(kinds) + " |\n|---|" + "---:|" * len(kinds) + "\n")
for arm, rounds in found.items():
    medians = [statistics.median([seconds.get(kind, 0.0) for seconds in rounds]) for kind in kinds]
    sys.stdout.write(f"| {arm} | " + " | ".join(f"{median:.2f}" for median in medians) + " |\n")
