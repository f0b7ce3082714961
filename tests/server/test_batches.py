"""Requests that come at once are decoded together; each keeps its answer, its report and its end to itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from prophetkv_rag.generation import turns
from tests.held_back import held_back
from tests.server.running import CHUNKS, FOREVER, Running, make_engine, running, wait_until

QUESTIONS = [f"How many of the {number} planes?" for number in range(4)]


@pytest.fixture
def server() -> Iterator[Running]:
    with running(make_engine(max_batch=4)) as found:
        found.engine.add_chunks(CHUNKS, owner="server")
        yield found


def ask(server: Running, number: int, **more: Any) -> dict[str, Any]:
    return server.ask_about(*CHUNKS[number:], question=QUESTIONS[number], **more)


def content(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_answers_at_once_are_those_of_one_by_one(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    packs: list[int] = []
    run_packed = turns.run_packed
    monkeypatch.setattr(
        turns, "run_packed", lambda model, jobs, **more: packs.append(len(jobs)) or run_packed(model, jobs, **more)
    )
    alone = [ask(server, number, max_tokens=24) for number in range(4)]
    assert packs == []
    with ThreadPoolExecutor(4) as pool, held_back(server.engine, 4):
        together = list(pool.map(lambda number: ask(server, number, max_tokens=24), range(4)))
    assert [content(answer) for answer in together] == [content(answer) for answer in alone]
    assert max(packs) > 1
    for one, other in zip(together, alone, strict=True):
        assert one["usage"] == other["usage"]
        assert one["prophetkv"]["recomputed_tokens"] == other["prophetkv"]["recomputed_tokens"]


def test_an_answer_without_an_end_holds_nobody_up_and_ends_when_its_client_goes(server: Running) -> None:
    body = server.body(*CHUNKS, question=QUESTIONS[0], max_tokens=FOREVER, stream=True)
    begun, done = threading.Event(), threading.Event()

    def listen() -> None:
        with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            for _ in response.iter_lines():
                begun.set()
                if done.is_set():
                    return

    listener = threading.Thread(target=listen)
    listener.start()
    assert begun.wait(30)
    assert content(ask(server, 1))
    assert any(queue.num_running for queue in server.services.queues)  # the other one is still at it
    done.set()
    listener.join()
    wait_until(server.is_idle)
