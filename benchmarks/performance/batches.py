"""Several prompts at once beside one after the other: how much sooner all of them are answered, and the first tokens.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/performance/batches.py
    OMP_WAIT_POLICY=PASSIVE python benchmarks/performance/batches.py --prompts 4 --answer-tokens 64 --repeats 5

Each prompt has passages of its own, as `accumulate`, `tree_summarize` and `map_reduce` make them. Both ways are run in
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

from prophetkv_rag import GenerationResult, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.defaults import fetch_default_model, read_speeches


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
    """Run both ways in turn and print a line for each number of prompts and length of answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Name or directory; SmolLM2-135M-Instruct by default.")
    parser.add_argument("--prompts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--answer-tokens", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, default=1000, help="Of a prompt's context.")
    parser.add_argument("--passage-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    engine = ProphetKVEngine.from_pretrained(
        options.model or fetch_default_model(),
        dtype=torch.float32,
        config=ProphetKVConfig(remember=False),
    )
    engine.end_tokens = frozenset()  # answers as long as they are asked for
    prompts = prompts_of(engine, max(options.prompts), options.tokens, options.passage_tokens)
    for prompt in prompts:  # what the first prompt with a chunk computes once
        engine.prefill(prompt)

    def at_once(count: int, **settings: Any) -> list[GenerationResult]:
        return engine.generate_batch(prompts[:count], **settings)

    def one_by_one(count: int, **settings: Any) -> list[GenerationResult]:
        return [engine.generate(prompt, **settings) for prompt in prompts[:count]]

    sys.stdout.write(
        "| prompts | answer | one by one, s | times sooner at once | same tokens |\n|---|---|---|---|---|\n"
    )
    for answer_tokens in options.answer_tokens:
        for count in options.prompts:
            ratios, seconds, same = [], [], True
            for _ in range(options.repeats):
                taken, answers = [], []
                for way in (one_by_one, at_once):
                    started = time.perf_counter()
                    answers.append(way(count, max_new_tokens=answer_tokens))
                    taken.append(time.perf_counter() - started)
                ratios.append(taken[0] / taken[1])
                seconds.append(taken[0])
                one, other = ([answer.token_ids for answer in found] for found in answers)
                same &= one == other
            line = f"| {count} | {answer_tokens} | {min(seconds):.1f} | {spread(ratios)} | {'yes' if same else 'no'} |"
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
