"""Who comes first where a step has no room for all: prompts, then registrations by turns, and nobody never."""

from __future__ import annotations

import pytest
import torch

from prophetkv_rag.config import parse_encoding
from prophetkv_rag.integrations.vllm.messages import EncodeJob, StepReport
from prophetkv_rag.integrations.vllm.registration import Registrations
from prophetkv_rag.integrations.vllm.settings import RequestOptions
from prophetkv_rag.store import ALONE, Behind, CacheIdentity, ChunkCache
from prophetkv_rag.store.disk import open_disk_store

IDENTITY = CacheIdentity("m", "t", (1,), "float32", "", "previous:2")


def ids_of(number, length=40):
    return (number,) * length


@pytest.fixture
def registrations(tmp_path):
    return Registrations(open_disk_store(tmp_path, ram_bytes=0), IDENTITY, parse_encoding("previous:2"), max_tokens=100)


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


def test_what_stands_before_a_chunk_is_known_or_came_with_it_and_is_encoded_first(registrations):
    named = tuple((IDENTITY.key(ids_of(other)),) for other in (99, 12, 10))
    registrations.begin("some", options([10, 11, 12], behind=named), most=100)
    jobs = registrations.next_jobs(1000)
    assert [(job.input_ids[0], job.behind) for job in jobs.values()] == [(10, ()), (12, (IDENTITY.key(ids_of(10)),))]
    registrations.learn(StepReport(encoded=list(jobs)))
    (job,) = registrations.next_jobs(100).values()
    assert job.behind == (IDENTITY.key(ids_of(12)),)


def store_chunk(store, key, behind=ALONE):
    rows = torch.zeros(2, 40, 8)
    cache = ChunkCache(torch.zeros(40, dtype=torch.int32), (rows,), (rows + 1,), behind)
    store.put(key, cache, fingerprint=IDENTITY.fingerprint)


def test_neighbours_may_be_encoded_with_a_chunk_and_so_take_room(tmp_path):
    store = open_disk_store(tmp_path, ram_bytes=0)
    neighbours = Registrations(store, IDENTITY, parse_encoding("previous:2+neighbours:3"), max_tokens=200)
    keys = [IDENTITY.key(ids_of(number)) for number in range(10, 14)]
    for key in keys:
        store_chunk(store, key)
    store_chunk(store, keys[3], Behind((keys[2],), (), True))  # those two are a document, in order, and stay so
    named = tuple(tuple(one for one in keys if one != key) for key in keys)
    neighbours.begin("all", options(range(10, 14), behind=named, as_neighbours=True), most=100)
    for key in keys[:2]:
        jobs = neighbours.next_jobs(1000)
        assert {one: (len(job.behind), job.is_chained) for one, job in jobs.items()} == {key: (3, False)}
        neighbours.learn(StepReport(encoded=list(jobs)))
    assert not neighbours.is_waiting("all")
    store_chunk(store, keys[0], Behind(tuple(keys[1:]), (), False))
    store_chunk(store, IDENTITY.key(ids_of(20)))
    for refresh, expected in ((False, 0), (True, 1)):
        other = ((IDENTITY.key(ids_of(20)),),)
        neighbours.begin("new", options([10], behind=other, as_neighbours=True, refresh=refresh), most=99)
        assert len(neighbours.next_jobs(1000)) == expected
    store.close()


def test_a_store_that_does_not_answer_is_said_of_every_chunk(registrations, tmp_path):
    for file in tmp_path.glob("catalog.sqlite*"):
        file.unlink()
    (tmp_path / "catalog.sqlite").mkdir()
    registrations._store.close()  # opened again with the next look
    registrations.begin("some", options([10, 11], behind=((), (IDENTITY.key(ids_of(12)),))), most=100)
    assert not registrations.is_waiting("some")
    said = registrations.finish("some")
    assert said["registered"] == []
    assert list(said["errors"]) == [IDENTITY.key(ids_of(number)) for number in (10, 11)]
