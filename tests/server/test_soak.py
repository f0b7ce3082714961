"""Many clients for a while: each answer equals the one given alone, whoever else asks, streams or gives up.

The bounded run is part of the suite. The long one (8 clients x 50 requests), also on the real model:
PROPHETKV_SOAK=50 pytest tests/server/test_soak.py
"""

from __future__ import annotations

import gc
import json
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.server.work_queue import Ticket
from tests.server.running import CHUNKS, Running, make_engine, running, wait_until
from tests.tiny import text_of

CLIENTS = 8
LONG_RUN = int(os.environ.get("PROPHETKV_SOAK", "0"))
REQUESTS = LONG_RUN or 6
QUESTIONS = ("How many planes?", "What is said on Monday?", "When does the museum open?", "Who jumps?", "Why?")
LIMIT_MIB = 40


def jobs(rng: random.Random, texts: list[str], max_tokens: int) -> dict[str, Any]:
    """A request: chunks in any order, some never registered, greedy or seeded."""
    job: dict[str, Any] = {
        "chunks": rng.sample(texts, rng.randint(0, 3)),
        "question": rng.choice(QUESTIONS),
        "max_tokens": rng.randint(1, max_tokens),
    }
    if rng.random() < 0.4:
        job |= {"temperature": 1.0, "top_p": 0.9, "seed": rng.randint(0, 3)}
    if rng.random() < 0.3:
        job["prophetkv"] = {"recompute_ratio": rng.choice([0.0, 0.5, 1.0])}
    return job


class Soak:
    def __init__(self, server: Running, texts: list[str], max_tokens: int) -> None:
        self.server, self.texts, self.max_tokens = server, texts, max_tokens
        self.expected: dict[str, str] = {}
        self.outcomes: Counter[str] = Counter()
        self.lock = threading.Lock()

    def alone(self, job: dict[str, Any]) -> str:
        """The answer to a request while nobody else asks."""
        name = json.dumps(job, sort_keys=True)
        if name not in self.expected:
            self.expected[name] = self.whole(self.send(job))
        return self.expected[name]

    def body(self, job: dict[str, Any], **more: Any) -> dict[str, Any]:
        options = {key: value for key, value in job.items() if key != "chunks"}
        return self.server.body(*job["chunks"], **options, **more)

    def send(self, job: dict[str, Any], client: httpx.Client | None = None) -> httpx.Response:
        with client or self.server.client() as made:
            return made.post("/v1/chat/completions", json=self.body(job))

    @staticmethod
    def whole(response: httpx.Response) -> str:
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    def client(self, seed: int, plan: list[dict[str, Any]]) -> None:
        """One client: asks what it planned, one after the other, and gives up on some of it."""
        rng = random.Random(seed)
        with self.server.client() as client:
            for job in plan:
                how = rng.choice(["whole", "stream", "stream", "leave a stream", "leave an answer"])
                found = self.ask(client, rng, job, how)
                with self.lock:
                    self.outcomes[how if found is not None else "given up"] += 1
                if found is not None:
                    assert found == self.expected[json.dumps(job, sort_keys=True)]

    def ask(self, client: httpx.Client, rng: random.Random, job: dict[str, Any], how: str) -> str | None:
        if how == "whole":
            return self.whole(client.post("/v1/chat/completions", json=self.body(job)))
        if how == "leave an answer":
            try:
                timeout = rng.uniform(0.001, 0.3)
                return self.whole(client.post("/v1/chat/completions", json=self.body(job), timeout=timeout))
            except httpx.TimeoutException:
                return None
        leaves_after = rng.randint(1, 3) if how == "leave a stream" else None
        pieces: list[str] = []
        with client.stream("POST", "/v1/chat/completions", json=self.body(job, stream=True)) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return "".join(pieces)
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    pieces.append(event["choices"][0]["delta"].get("content") or "")
                    if len(pieces) == leaves_after:
                        return None
        msg = "the stream ended early"
        raise AssertionError(msg)

    def run(self, plans: list[list[dict[str, Any]]], seed: int) -> None:
        with ThreadPoolExecutor(max_workers=len(plans)) as pool:
            futures = [pool.submit(self.client, seed + number, plan) for number, plan in enumerate(plans)]
            for future in futures:
                future.result()
        wait_until(self.server.is_idle)


def soak(engine: ProphetKVEngine, texts: list[str], *, max_tokens: int, requests: int) -> Counter[str]:
    threads = set(threading.enumerate())
    # A client that gave up may ask again before the server has noticed, so it can hold more places than one.
    with running(engine, max_queue=4 * CLIENTS) as server:
        # The last text is never registered: it is an ordinary part of prompts.
        engine.add_chunks(texts[:-1])
        state = Soak(server, texts, max_tokens)
        rng = random.Random(5)
        pool = [jobs(rng, texts, max_tokens) for _ in range(min(40, CLIENTS * requests // 2))]
        for job in pool:
            state.alone(job)
        plans = [[rng.choice(pool) for _ in range(requests)] for _ in range(CLIENTS)]
        state.run([plan[: max(2, requests // 5)] for plan in plans], seed=100)  # warm: caches of libraries fill up
        gc.collect()
        before = psutil.Process().memory_info().rss
        forgotten = len([item for item in gc.get_objects() if isinstance(item, Ticket)])
        state.run(plans, seed=200)
        gc.collect()
        grown = (psutil.Process().memory_info().rss - before) / 2**20
        assert len([item for item in gc.get_objects() if isinstance(item, Ticket)]) <= forgotten + 1
        assert grown < LIMIT_MIB, f"memory grew by {grown:.0f} MiB"
        given_up = sum(server.metric("prophetkv_requests_total", outcome=name) for name in ("cancelled",))
        print(f"\n{dict(state.outcomes)}, stopped by the server: {given_up:.0f}, memory {grown:+.1f} MiB")
        assert given_up > 0
    assert set(threading.enumerate()) <= threads
    return state.outcomes


def test_soak() -> None:
    texts = [*CHUNKS, *(text_of(60, seed=seed) for seed in range(4))]
    outcomes = soak(make_engine(max_batch=4), texts, max_tokens=24, requests=REQUESTS)
    assert sum(outcomes.values()) >= CLIENTS * REQUESTS
    assert min(outcomes[how] for how in ("whole", "stream", "given up")) > 0


@pytest.mark.model
@pytest.mark.skipif(not LONG_RUN, reason="takes minutes; set PROPHETKV_SOAK=50")
@pytest.mark.timeout(3600)
def test_soak_on_the_real_model() -> None:
    config = ProphetKVConfig(max_batch=4, remember=False)  # what is remembered depends on what was asked before
    engine = ProphetKVEngine.from_pretrained(fetch_default_model(), config=config)
    texts = [*CHUNKS, *(text_of(60, seed=seed) for seed in range(4))]
    soak(engine, texts, max_tokens=4, requests=REQUESTS)
