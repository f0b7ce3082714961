"""Who comes first where a step has no room for all: prompts, then registrations by turns, and nobody never."""

from __future__ import annotations

import pytest

from prophetkv_rag.integrations.vllm.messages import EncodeJob, StepReport
from prophetkv_rag.integrations.vllm.registration import Registrations
from prophetkv_rag.integrations.vllm.settings import RequestOptions
from prophetkv_rag.store import CacheIdentity
from prophetkv_rag.store.disk import open_disk_store

IDENTITY = CacheIdentity("m", "t", (1,), "float32", "", "previous:2")


def ids_of(number, length=40):
    return (number,) * length


@pytest.fixture
def registrations(tmp_path):
    return Registrations(open_disk_store(tmp_path, ram_bytes=0), IDENTITY, count=2, max_tokens=100)


def options(numbers, **more):
    return RequestOptions(register=tuple(map(ids_of, numbers)), **more)


def step(registrations, room=100):
    """One step, whose chunks are stored; returns their first tokens."""
    jobs = registrations.next_jobs(room)
    registrations.learn(StepReport(encoded=list(jobs)))
    return [job.input_ids[0] for job in jobs.values()]


def test_registrations_take_turns(registrations):
    registrations.begin("large", options(range(10, 16)), most=100)
    registrations.begin("small", options([20]), most=100)
    assert step(registrations) == [10, 11]
    assert step(registrations) == [20, 12]  # not after all of the large one
    assert not registrations.is_waiting("small")


def test_what_a_prompt_waits_for_goes_first(registrations):
    registrations.begin("large", options(range(10, 16)), most=100)
    registrations.await_caches("prompt", {"second": EncodeJob(ids_of(7), kept_with="own")})
    assert step(registrations) == [7, 10]
    assert registrations.finish("prompt") is None


def test_a_chunk_that_found_a_step_full_has_room_in_the_next(registrations):
    """Else requests that come all the time would take all room, each time."""
    registrations.begin("one", options([10]), most=100)
    assert step(registrations, room=30) == []
    assert registrations.reserved == 40
    assert step(registrations, room=60) == [10]
    assert registrations.reserved == 0


def test_chunks_wait_for_those_before_them(registrations):
    registrations.begin("document", options(range(10, 14), in_order=True), most=100)
    first = registrations.next_jobs(100)
    assert [job.input_ids[0] for job in first.values()] == [10, 11]
    assert [len(job.behind) for job in first.values()] == [0, 1]
    assert registrations.next_jobs(100) == {}  # with asynchronous scheduling a step is planned before the last one ends
    registrations.learn(StepReport(encoded=list(first)))
    second = registrations.next_jobs(100)
    assert [[one in first for one in job.behind] for job in second.values()] == [[True, True], [True, False]]


def test_what_stands_before_a_chunk_is_known_or_comes_before_it(registrations):
    named = tuple((IDENTITY.key(ids_of(other)),) for other in (99, 12, 10))
    registrations.begin("some", options([10, 11, 12], behind=named), most=100)
    jobs = registrations.next_jobs(1000)
    assert [len(job.behind) for job in jobs.values()] == [0, 0]
    registrations.learn(StepReport(encoded=list(jobs)))
    (job,) = registrations.next_jobs(100).values()
    assert job.behind == (IDENTITY.key(ids_of(10)),)
