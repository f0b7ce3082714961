"""`serve --engine vllm` over a long time: many clients that come and go, chunks that do, and processes that die."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from prophetkv_rag import ProphetKVEngine
from tests.tiny import save_tiny, text_of
from tests.vllm.running import serving
from tests.vllm.serving import AS_IN_VLLM
from tests.vllm.test_models import SHAPE

REQUESTS = int(os.environ.get("PROPHETKV_CLIENT_REQUESTS", "20"))
"""Of each client; 50 for a longer look."""

DOCUMENT = [text_of(70, seed=seed) for seed in range(4)]
PASSING = text_of(70, seed=30)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), **SHAPE)


def chat(number, *, passing=False):
    order = [*DOCUMENT[number % 4 :], *DOCUMENT[: number % 4], *([PASSING] if passing else [])]
    return [{"role": "user", "content": "\n\n".join(order) + f"\n\n{text_of(8, seed=50 + number)}"}]


def post(url, messages, *, timeout=None, **body):
    body = {"model": "model", "messages": messages, "max_tokens": 6, "temperature": 0} | body
    return httpx.post(f"{url}/chat/completions", json=body, timeout=timeout)


def content(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"].rstrip("\ufffd")


def gauges(url):
    """What vLLM says of requests that run and wait, and of its pages."""
    lines = httpx.get(f"{url.removesuffix('/v1')}/metrics").text.splitlines()
    names = ("num_requests_running", "num_requests_waiting{", "kv_cache_usage_perc")
    return [float(line.split()[-1]) for name in names for line in lines if line.startswith(f"vllm:{name}")]


def memory(process):
    """Bytes of the server and all its processes."""
    parts = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(part.memory_info().rss for part in parts)


def test_many_clients_that_come_and_go(model, tmp_path):
    """Eight clients, some requests each: a third leave, while a chunk is registered and deleted."""
    engine = ProphetKVEngine.from_pretrained(model, config=AS_IN_VLLM)
    engine.add_chunks(DOCUMENT, behind=[DOCUMENT[:number] for number in range(4)])
    expected = [engine.generate(chat(number), max_new_tokens=6).text.rstrip("\ufffd") for number in range(4)]

    def client(url, seed, count):
        draw, wrong = random.Random(seed), []
        for _ in range(count):
            number, what = draw.randrange(4), draw.random()
            if what < 0.33:
                with contextlib.suppress(httpx.TimeoutException):
                    post(url, chat(number), max_tokens=900, timeout=0.02 + draw.random() / 4)
            elif what < 0.5:  # its chunk is there or is not: an answer in any case
                content(post(url, chat(number, passing=True)))
            elif content(post(url, chat(number))) != expected[number]:
                wrong.append(number)
        return wrong

    def come_and_go(url, is_over):
        while not is_over.is_set():
            body = {"chunks": [PASSING], "namespace": "passing"}
            httpx.put(f"{url}/chunks", json=body, timeout=None).raise_for_status()
            httpx.request("DELETE", f"{url}/chunks", json=body, timeout=None).raise_for_status()

    with serving(model, tmp_path, "--model-name", "model", async_scheduling=True) as server:
        httpx.put(f"{server.url}/chunks", json={"chunks": DOCUMENT, "in_order": True}, timeout=None).raise_for_status()
        is_over, held = threading.Event(), []
        with ThreadPoolExecutor(9) as pool:
            passing = pool.submit(come_and_go, server.url, is_over)
            try:
                for count in (REQUESTS // 4, REQUESTS - REQUESTS // 4):
                    clients = [pool.submit(client, server.url, seed + count, count) for seed in range(8)]
                    assert [one.result() for one in clients] == [[]] * 8
                    held.append(memory(server.process))
            finally:
                is_over.set()
            passing.result()
        deadline = time.monotonic() + 30
        while any(gauges(server.url)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert gauges(server.url) == [0.0, 0.0, 0.0]  # no request is left, and no page is held
        print(f"{8 * REQUESTS} requests; memory {held[0] >> 20} MiB after a quarter, {held[1] >> 20} MiB at the end")
        assert held[1] - held[0] < 64 << 20


def test_a_killed_worker_ends_the_server(model, tmp_path):
    with serving(model, tmp_path, "--model-name", "model", tensor_parallel_size=2, is_ended=False) as server:
        httpx.put(f"{server.url}/chunks", json={"chunks": DOCUMENT, "in_order": True}, timeout=None).raise_for_status()
        assert content(post(server.url, chat(0)))
        workers = [
            one for one in psutil.Process(server.process.pid).children(recursive=True) if "Worker" in one.cmdline()[0]
        ]
        assert len(workers) == 2
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(post, server.url, chat(1), max_tokens=1500)
            time.sleep(1)
            workers[1].kill()
            with contextlib.suppress(httpx.TransportError):
                assert running.result().status_code >= 500  # an error, and no waiting for ever
        assert server.process.wait(timeout=120) == 2
        assert "vLLM has died" in server.log.read_text()
