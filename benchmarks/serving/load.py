"""Clients of a chat server: prompts whose chunks come in changing order, sent at random times, answers timed."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

BEGINNING = "Answer from these passages.\n\n"
"""What every prompt has before its chunks."""


@dataclass
class Timed:
    """One answer: when its pieces came, in seconds from its sending."""

    arrivals: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ttft(self) -> float:
        """Time to the first piece."""
        return self.arrivals[0]

    @property
    def gaps(self) -> list[float]:
        """Times between pieces."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


def prompts_of(chunks: Sequence[str], questions: Sequence[str], *, count: int, each: int, seed: int) -> list[str]:
    """Return user messages that hold `each` chunks in a random order, and a question; no two alike."""
    draw = random.Random(seed)
    return [
        BEGINNING
        + "\n\n".join(draw.sample(list(chunks), each))
        + f"\n\n{questions[number % len(questions)]} (request {seed}-{number})"
        for number in range(count)
    ]


async def drive(url: str, model: str, prompts: Sequence[str], *, clients: int, rate: float, tokens: int) -> list[Timed]:
    """Send the prompts: Poisson arrivals of `rate` a second, at most `clients` at a time."""
    draw, places = random.Random(clients), asyncio.Semaphore(clients)
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=clients)) as http:

        async def one(prompt: str) -> Timed:
            async with places:
                return await answer(http, url, model, prompt, tokens)

        tasks = []
        for prompt in prompts:
            tasks.append(asyncio.create_task(one(prompt)))
            await asyncio.sleep(draw.expovariate(rate))
        return list(await asyncio.gather(*tasks))


async def answer(
    http: httpx.AsyncClient, url: str, model: str, prompt: str, tokens: int, timed: Timed | None = None
) -> Timed:
    """Send one prompt and time its answer, in `timed` if it is given."""
    timed, body = timed or Timed(), _body(model, prompt, tokens)
    started = time.perf_counter()
    async with http.stream("POST", f"{url}/chat/completions", json=body) as response:
        if response.status_code != 200:
            timed.error = (await response.aread()).decode()[:200]
            return timed
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                timed.error = str(event["error"])
            if event.get("choices") and event["choices"][0]["delta"].get("content"):
                timed.arrivals.append(time.perf_counter() - started)
    if not timed.arrivals and not timed.error:
        timed.error = "no token came"
    return timed


def _body(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(answers: Sequence[Timed], seconds: float) -> dict[str, float]:
    """Return what a table shows of a run."""
    good = [answer for answer in answers if not answer.error]
    gaps = [gap for answer in good for gap in answer.gaps] or [0.0]
    ttfts = [answer.ttft for answer in good] or [0.0]
    return {
        "requests": len(answers),
        "errors": len(answers) - len(good),
        "ttft_p50": quantile(ttfts, 0.5),
        "ttft_p95": quantile(ttfts, 0.95),
        "gap_p50": quantile(gaps, 0.5),
        "gap_p95": quantile(gaps, 0.95),
        "tokens_per_s": sum(len(answer.arrivals) for answer in good) / seconds,
    }
