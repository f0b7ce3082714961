"""Many requests at once: a bound, first come first served, and clients that go away at every moment."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from prophetkv_rag import DeadlineError
from prophetkv_rag.server.errors import ApiError
from prophetkv_rag.server.work_queue import Ticket, WorkQueue
from tests.clock import at_forward, stop_the_clock
from tests.server.running import CHUNKS, FOREVER, Running, make_engine, running, wait_until

MAX_QUEUE = 2


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(make_engine(), max_queue=MAX_QUEUE, ping_s=0.2) as found:
        found.engine.add_chunks(CHUNKS)
        yield found


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=8) as made:
        yield made


@contextmanager
def busy(server: Running) -> Iterator[None]:
    """The model is somebody else's for a while: a request whose turn has come stands still before its prefill."""
    wait_until(server.is_idle)
    with server.engine.model_lock:
        yield


def waiting(server: Running) -> tuple[int, int]:
    queue = server.services.chat.queue
    return queue.num_running, queue.num_waiting


def send(server: Running, pool: ThreadPoolExecutor, count: int, **more: Any) -> list[Future[httpx.Response]]:
    """Send requests so that each stands in the queue before the next is sent."""
    found = []
    for number in range(count):
        before = sum(waiting(server))
        found.append(pool.submit(server.ask, question=f"Number {number}?", **more))
        wait_until(lambda: sum(waiting(server)) > before)  # noqa: B023
    wait_until(lambda: waiting(server)[0] == 1)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_the_bound(server: Running, pool: ThreadPoolExecutor, stream: bool) -> None:
    with busy(server):
        accepted = send(server, pool, 1 + MAX_QUEUE, stream=stream)
        assert waiting(server) == (1, MAX_QUEUE)
        assert server.metric("prophetkv_queue_length", queue="chat") == MAX_QUEUE
        assert server.metric("prophetkv_running", queue="chat") == 1
        refused = server.ask(stream=stream)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        with server.client() as client:  # what needs no model is answered all the while
            assert client.get("/health").status_code == client.get("/v1/models").status_code == 200
    assert [future.result().status_code for future in accepted] == [200] * 3
    assert server.ask().status_code == 200


def test_first_come_first_served(server: Running, pool: ThreadPoolExecutor) -> None:
    order: list[int] = []
    with busy(server):
        for number, future in enumerate(send(server, pool, 1 + MAX_QUEUE, max_tokens=30)):
            future.add_done_callback(lambda _, number=number: order.append(number))  # type: ignore[misc]
    wait_until(lambda: len(order) == 3)
    assert order == [0, 1, 2]


@contextmanager
def raw_request(server: Running, **more: Any) -> Iterator[socket.socket]:
    """A request on a socket of our own, which closes when the block ends."""
    body = json.dumps(server.body(*CHUNKS[:2], **more)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield raw


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(server: Running, pool: ThreadPoolExecutor, stream: bool) -> None:
    cancelled = server.metric("prophetkv_requests_total", outcome="cancelled")
    with busy(server):
        [first] = send(server, pool, 1)
        with raw_request(server, stream=stream):
            wait_until(lambda: waiting(server) == (1, 1))
        wait_until(lambda: waiting(server) == (1, 0))  # though the model is still another's
    assert first.result().status_code == 200
    assert server.metric("prophetkv_requests_total", outcome="cancelled") == cancelled + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_generating", [False, True], ids=["before the prefill", "generating"])
def test_a_client_that_goes_away_stops_the_model(server: Running, stream: bool, is_generating: bool) -> None:
    forwards: list[int] = []
    hook = server.engine.model.register_forward_hook(lambda *_: forwards.append(1))
    cancelled = server.metric("prophetkv_requests_total", outcome="cancelled")
    try:
        if is_generating:
            wait_until(server.is_idle)
            with raw_request(server, stream=stream, max_tokens=FOREVER):
                wait_until(lambda: len(forwards) > 5)
            wait_until(server.is_idle)
            assert len(forwards) < FOREVER / 2
        else:
            with busy(server):
                with raw_request(server, stream=stream, max_tokens=FOREVER):
                    wait_until(lambda: waiting(server) == (1, 0))
                wait_until(server.is_idle)
            assert not forwards
    finally:
        hook.remove()
    assert server.metric("prophetkv_requests_total", outcome="cancelled") == cancelled + 1
    assert server.ask().status_code == 200


def test_a_client_that_does_not_read_does_not_hold_the_model(server: Running) -> None:
    with raw_request(server, stream=True, max_tokens=300):
        wait_until(lambda: waiting(server)[0] == 1)
        wait_until(server.is_idle)
        assert server.ask().status_code == 200


@contextmanager
def commented(server: Running, **more: Any) -> Iterator[tuple[Iterator[str], ExitStack]]:
    """A stream that has just said it waits, as its lines, and what ends its waiting when closed."""
    with ExitStack() as waiting_for_the_model, server.client() as client:
        waiting_for_the_model.enter_context(busy(server))
        with client.stream("POST", "/v1/chat/completions", json=server.body(stream=True, **more)) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            assert ": waiting" in lines  # read up to there
            yield lines, waiting_for_the_model


def test_a_stream_that_waits_sends_comments(server: Running) -> None:
    with commented(server) as (lines, waiting_for_the_model):
        waiting_for_the_model.close()
        said = [line for line in lines if line]
    assert said[-1] == "data: [DONE]"
    assert len(said) > 2, "the answer follows"


@pytest.fixture
def silent_server() -> Iterator[Running]:
    """A server whose streams send no comments, so that an error always comes before the status is sent."""
    with running(make_engine(), max_queue=MAX_QUEUE, ping_s=3600) as found:
        yield found


def test_deadlines(silent_server: Running, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    server = silent_server

    def late(**more: Any) -> httpx.Response:
        return server.ask(prophetkv={"deadline_s": 1e-6}, **more)

    with busy(server):
        running_late = late()  # there is room, but its time is over
        [first] = send(server, pool, 1)
        waiting_late = late()
        streamed_late = late(stream=True)
        assert waiting(server) == (1, 0)
    assert first.result().status_code == 200
    for response in (running_late, waiting_late, streamed_late):
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
        assert response.headers["x-should-retry"] == "false"
    clock = stop_the_clock(monkeypatch)
    with at_forward(server.engine.model.model, 5, clock.pass_all_deadlines):
        cut = server.ask(prophetkv={"deadline_s": 600}, max_tokens=FOREVER).json()
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["prophetkv"]["finish_reason"] == "deadline"
    assert 0 < cut["usage"]["completion_tokens"] <= 5


def test_a_deadline_that_passes_after_a_comment_is_an_event(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = stop_the_clock(monkeypatch)
    with commented(server, prophetkv={"deadline_s": 600}) as (lines, _):
        clock.pass_all_deadlines()
        assert '"code":"deadline_exceeded"' in "".join(lines)


def test_indexing_does_not_stop_chats(server: Running, pool: ThreadPoolExecutor) -> None:
    """Chunks stand in a queue of their own."""
    with busy(server), server.client() as client:
        put = pool.submit(client.put, "/v1/chunks", json={"chunks": [f"{text} again" for text in CHUNKS]})
        wait_until(lambda: server.services.chunks.queue.num_running == 1)
        chat = send(server, pool, 1)
        assert waiting(server) == (1, 0)
        server.engine.model_lock.release()
        try:
            assert put.result().status_code == 200
        finally:
            server.engine.model_lock.acquire()
    assert chat[0].result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_shutting_down(stream: bool) -> None:
    """What waits is turned away at once, what runs is finished, and no thread is left."""
    before = set(threading.enumerate())
    with ThreadPoolExecutor(max_workers=4) as pool, running(make_engine()) as server:
        with busy(server):
            first, second = send(server, pool, 2, stream=stream)
            server.services.drain()
            turned_away = second.result()
            assert turned_away.status_code == 503
            assert turned_away.json()["error"]["code"] == "shutting_down"
            assert server.ask().status_code == 503
        assert first.result().status_code == 200
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("stream", [False, True])
def test_shutting_down_cuts_what_takes_too_long(stream: bool) -> None:
    before = set(threading.enumerate())
    with ThreadPoolExecutor(max_workers=4) as pool, running(make_engine(), grace_s=1) as server:
        slow = threading.Event()
        server.engine.model.register_forward_hook(lambda *_: slow.wait(0.02))
        answer = pool.submit(server.ask, max_tokens=FOREVER, stream=stream)
        wait_until(lambda: waiting(server)[0] == 1)
        server.server.should_exit = True
        try:
            response = answer.result()
        except httpx.HTTPError:
            pass
        else:  # never half an answer that looks whole
            assert response.status_code >= 500 or "[DONE]" not in response.text
    assert set(threading.enumerate()) <= before


async def test_the_queue_by_itself() -> None:
    queue = WorkQueue("test", max_waiting=1)
    queue.start()
    gate, dropped = threading.Event(), list[str]()

    def hold(ticket: Ticket[int]) -> Iterator[int]:
        gate.wait(300)
        yield 1

    def fail(ticket: Ticket[int]) -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    first = queue.submit(hold)
    second = queue.submit(fail)
    with pytest.raises(ApiError) as full:
        queue.submit(fail)
    assert full.value.status == 429
    queue.give_up(second)
    late = queue.submit(fail, deadline_s=0, on_dropped=dropped.append)
    with pytest.raises(DeadlineError):
        await anext(late)
    third = queue.submit(fail, on_dropped=dropped.append)
    gate.set()
    assert [item async for item in first] == [1]
    assert await anext(third) == 1
    with pytest.raises(ZeroDivisionError):
        await anext(third)
    assert dropped == ["deadline_exceeded"]
    gate.clear()
    while queue.num_running:  # the third one's error was out before its place was free
        await asyncio.sleep(0.01)
    running_one, fourth = queue.submit(hold), queue.submit(hold, on_dropped=dropped.append)
    while not queue.num_running:
        await asyncio.sleep(0.01)
    queue.close()
    with pytest.raises(ApiError, match="shutting down"):
        await anext(fourth)
    gate.set()
    assert [item async for item in running_one] == [1]
    await asyncio.to_thread(queue.stop)
    assert dropped == ["deadline_exceeded", "shutting_down"]
    with pytest.raises(ApiError, match="shutting down"):
        queue.submit(lambda ticket: [1])


async def test_a_queue_that_nobody_starts_starts_with_its_first_work() -> None:
    """Mounted applications get no lifespan."""
    queue = WorkQueue("test", max_waiting=1)
    assert [item async for item in queue.submit(lambda ticket: [1])] == [1]
    await asyncio.to_thread(queue.stop)
    queue.start()  # a second lifespan
    assert [item async for item in queue.submit(lambda ticket: [2])] == [2]
    await asyncio.to_thread(queue.stop)
    assert not [thread for thread in threading.enumerate() if thread.name == "prophetkv-test"]
