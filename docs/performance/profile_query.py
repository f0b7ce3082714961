"""Prints where the seconds of a query go, by kind of operation, beside full prefill's of the same prompt.

    python -P docs/performance/profile_query.py 4096 0.2               # the table (medians over rounds, alternating)
    pip install --no-deps --target OLD OLD_CHECKOUT                     # another version, beside this one:
    PYTHONPATH=OLD python -P docs/performance/profile_query.py 4096 0.2
    py-spy record -o flame.svg -r 200 -- python -P docs/performance/profile_query.py 4096 0.2 --reuse-only

Uses only what the first version had as well. Operations are those of torch's profiler (self CPU time of the calling
thread, which waits for the others); what is left of the wall-clock time is Python and the dispatcher.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

import prophetkv_rag
from prophetkv_rag.default_model import fetch_default_model
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.evaluation.ttft import corpus_prompt
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
parser.add_argument("--reuse-only", action="store_true", help="for a sampling profiler: no full prefill, no table")
args = parser.parse_args()

model, tokenizer = load_model(fetch_default_model())
engine = ProphetKVEngine(model, tokenizer)
prompt = corpus_prompt(engine, args.context, 256)
engine.add_chunks(prompt.chunks)
ARMS = {"full_prefill": 1.0, "prophetkv": args.ratio}
if args.reuse_only:
    for _ in range(args.rounds + 1):
        engine.prefill(prompt, strategy="prophetkv", recompute_ratio=args.ratio)
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
