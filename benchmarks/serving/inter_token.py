"""How long a stream waits between two tokens while RAG prompts arrive: vLLM alone, and with `--max-stage-tokens`.

From the repository's root, after `make vllm`:

    .venv-vllm/bin/python -P benchmarks/serving/inter_token.py

One client reads a stream; four others send a prompt with four chunks each, at once, `--rounds` times. Gaps of the
stream are counted from the sending until the last of the four has its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from load import Timed, answer, prompts_of, quantile
from run import QUESTIONS, register, server

from prophetkv_rag.defaults import fetch_default_model, read_speeches

CHUNK_WORDS, AT_ONCE = 130, 4


def main() -> None:
    """Measure each setting and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-stage-tokens", type=int, nargs="*", default=[128, 512], help="beside the default")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| | between tokens p50, s | p95 | longest | first token of the four, p50, s |\n" + "|---" * 5 + "|")  # noqa: T201
    for system, most in [("vllm", None), *(("vllm+prophetkv", most) for most in (None, *args.max_stage_tokens))]:
        with serving(system, most) as (url, name, chunks):
            asyncio.run(_round(url, name, chunks, 99))  # what is loaded lazily
            found = [asyncio.run(_round(url, name, chunks, number)) for number in range(args.rounds)]
        gaps = [gap for gaps, _ in found for gap in gaps]
        firsts = [first for _, firsts in found for first in firsts]
        label = system if system == "vllm" else f"{system}, `--max-stage-tokens {most or '(default)'}`"
        numbers = (quantile(gaps, 0.5), quantile(gaps, 0.95), max(gaps), quantile(firsts, 0.5))
        print(f"| {label} | " + " | ".join(f"{number:.3g}" for number in numbers) + " |", flush=True)  # noqa: T201


@contextmanager
def serving(system: str, most: int | None) -> Iterator[tuple[str, str, list[str]]]:
    """Start a system whose chunks are registered."""
    words = " ".join(read_speeches().values()).split()
    chunks = [" ".join(words[start : start + CHUNK_WORDS]) for start in range(0, 24 * CHUNK_WORDS, CHUNK_WORDS)]
    given = {"dtype": "float32", "max_model_len": 4096, "recompute_ratio": None, "max_stage_tokens": most}
    with server(system, str(fetch_default_model()), argparse.Namespace(**given)) as (url, name):
        register(system, url, chunks)
        yield url, name, chunks


async def _round(url: str, name: str, chunks: list[str], number: int) -> tuple[list[float], list[float]]:
    """Return the stream's gaps while four prompts arrive, and their times to the first token."""
    prompts = prompts_of(chunks, QUESTIONS, count=AT_ONCE, each=4, seed=number)
    stream = Timed()
    async with httpx.AsyncClient(timeout=None) as http:
        sent = time.perf_counter()
        reading = asyncio.create_task(answer(http, url, name, f"Count from {number} to 500.", 400, stream))
        while len(stream.arrivals) < 8:
            if reading.done():
                sys.exit(f"the stream ended too soon: {stream.error}")
            await asyncio.sleep(0.01)
        begun = time.perf_counter() - sent
        others: list[Any] = await asyncio.gather(*(answer(http, url, name, one, 2) for one in prompts))
        ended = time.perf_counter() - sent
        reading.cancel()
    held = [at for at in stream.arrivals if begun <= at <= ended]
    return [after - before for before, after in pairwise(held)], [one.ttft for one in others]


if __name__ == "__main__":
    main()
