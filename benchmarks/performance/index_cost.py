"""What encoding chunks behind others costs, as a multiple of encoding them alone; rounds take turns in one process.

    python benchmarks/performance/index_cost.py --chunks 64 --rounds 3

The chunks are neighbours of each other in the order of the shipped speeches, which stand for embeddings here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llama_index.core.node_parser import SentenceSplitter

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.defaults.corpus import read_speeches
from prophetkv_rag.model import load_model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Model directory; SmolLM2-135M-Instruct by default.")
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--documents", type=int, default=8, help="Documents that the chunks are cut into.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer = load_model(str(options.model or fetch_default_model()))
    splitter = SentenceSplitter(
        chunk_size=options.chunk_tokens,
        chunk_overlap=0,
        tokenizer=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
    )
    cut = [chunk for text in read_speeches().values() for chunk in splitter.split_text(text)]
    texts = list(dict.fromkeys(cut))[: options.chunks]
    size = -(-len(texts) // options.documents)
    previous = [texts[max(number - number % size, number - 2) : number] for number in range(len(texts))]
    near = [[texts[(number + step) % len(texts)] for step in (3, 2, 1)] for number in range(len(texts))]

    def plain() -> None:
        ProphetKVEngine(model, tokenizer).add_chunks(texts)

    def chained() -> None:
        ProphetKVEngine(model, tokenizer, config=ProphetKVConfig(encoding="previous:2")).add_chunks(
            texts, behind=previous
        )

    def neighbours() -> None:
        engine = ProphetKVEngine(model, tokenizer, config=ProphetKVConfig(encoding="neighbours:3"))
        engine.add_chunks(texts)
        engine.add_chunks(texts, behind=near)

    ways: dict[str, Callable[[], None]] = {"plain": plain, "previous:2": chained, "neighbours:3": neighbours}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    sys.stdout.write(f"{len(texts)} chunks of {options.chunk_tokens} tokens, {Path(str(model.name_or_path)).name}\n")
    for name, measured in seconds.items():
        ratios = [one / base for one, base in zip(measured, seconds["plain"], strict=True)]
        sys.stdout.write(
            f"{name:13} {statistics.median(measured):6.2f} s  {statistics.median(ratios):.2f} times plain "
            f"({min(ratios):.2f} to {max(ratios):.2f})\n"
        )


if __name__ == "__main__":
    main()
