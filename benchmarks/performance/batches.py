"""Several prompts at once beside one after the other: how much sooner all of them are answered, and the first tokens.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/performance/batches.py
    OMP_WAIT_POLICY=PASSIVE python benchmarks/performance/batches.py --prompts 4 --answer-tokens 64 --repeats 5

Each prompt has passages of its own, as `accumulate`, `tree_summarize` and `map_reduce` make them. All ways are run in
turn, in one process, and the ratios of neighbouring runs are printed: those hold on a machine that does other things
too, as far as anything does. The passages are of the shipped speeches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.defaults import fetch_default_model, read_speeches
from prophetkv_rag.model import load_model
from prophetkv_rag.store import ChunkStore


def prompts_of(engine: ProphetKVEngine, count: int, tokens: int, size: int) -> list[list[dict[str, str]]]:
    """Return prompts of about `tokens` tokens of context each, in passages of about `size`, which are added."""
    words = " ".join(read_speeches().values()).split()
    per_passage, per_prompt = size * 3 // 4, max(1, tokens // size)
    passages = [" ".join(words[at : at + per_passage]) for at in range(0, len(words), per_passage)]
    passages = passages[: count * per_prompt]
    engine.add_chunks(passages)
    prompts = []
    for number in range(count):
        context = "\n\n".join(passages[(number * per_prompt + i) % len(passages)] for i in range(per_prompt))
        text = f"Context:\n\n{context}\n\nSay in a few sentences what is said of the people, and why."
        prompts.append([{"role": "user", "content": text}])
    return prompts


def spread(values: list[float]) -> str:
    """Return the median, and the least and the most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Run all ways in turn and print a line for each number of prompts and length of answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Name or directory; SmolLM2-135M-Instruct by default.")
    parser.add_argument("--prompts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--answer-tokens", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, default=1000, help="Of a prompt's context.")
    parser.add_argument("--passage-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    first = engine_of(*load_model(options.model or fetch_default_model(), dtype=torch.float32))
    prompts = prompts_of(first, max(options.prompts), options.tokens, options.passage_tokens)
    engines = {
        "one by one": first,
        "decoded together": engine_of(first.model, first.tokenizer, first.store, batch_prefill=False),
        "stages too": engine_of(first.model, first.tokenizer, first.store, batch_prefill=True),
    }
    for prompt in prompts:  # what the first prompt with a chunk first computes once, for the store of all
        first.prefill(prompt)
    for engine in engines.values():
        engine.end_tokens = frozenset()  # answers as long as they are asked for
    heads = ["prompts", "answer tokens", "one by one, s", "decoded together", "stages too", "same tokens"]
    sys.stdout.write("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|\n")
    for answer_tokens in options.answer_tokens:
        for count in options.prompts:
            runs = [run(engines, prompts[:count], answer_tokens) for _ in range(options.repeats)]
            base = [seconds["one by one"][0] for seconds in runs]
            ratios = [spread([one["one by one"][0] / one[name][0] for one in runs]) for name in list(engines)[1:]]
            same = all(one[name][1] == one["one by one"][1] for one in runs for name in engines)
            cells = [count, answer_tokens, f"{min(base):.1f}", *ratios, "yes" if same else "no"]
            sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")
            sys.stdout.flush()


def engine_of(model: Any, tokenizer: Any, store: ChunkStore | None = None, **settings: Any) -> ProphetKVEngine:
    """Return an engine that remembers nothing."""
    return ProphetKVEngine(model, tokenizer, config=ProphetKVConfig(remember=False, **settings), store=store)


def run(
    engines: dict[str, ProphetKVEngine], prompts: list[Any], answer_tokens: int
) -> dict[str, tuple[float, list[tuple[int, ...]]]]:
    """Answer the prompts in each way; return its seconds and tokens."""
    found = {}
    for name, engine in engines.items():
        started = time.perf_counter()
        if name == "one by one":
            answers = [engine.generate(prompt, max_new_tokens=answer_tokens) for prompt in prompts]
        else:
            answers = engine.generate_batch(prompts, max_new_tokens=answer_tokens)
        found[name] = time.perf_counter() - started, [answer.token_ids for answer in answers]
    return found


if __name__ == "__main__":
    main()
