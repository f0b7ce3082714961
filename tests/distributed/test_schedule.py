"""Which documents are sent out together, and which wait for others."""

from __future__ import annotations

import random

from prophetkv_rag.distributed.schedule import MAX_DOCUMENTS, Schedule


def all_jobs(schedule: Schedule) -> list[list[int]]:
    jobs = []
    while (job := schedule.take()) is not None:
        jobs.append(job)
        schedule.done(job)
    return jobs


def test_a_document_waits_for_those_before_it_that_have_a_chunk_of_its() -> None:
    schedule = Schedule([["a", "b"], ["c", "a"], ["d"]], [5, 9, 1], side_by_side=1, job_tokens=0)
    assert schedule.owner == {"a": 0, "b": 0, "c": 1, "d": 2}
    first, second = schedule.take(), schedule.take()
    assert (first, second, schedule.take()) == ([0], [2], None)
    schedule.done([2])
    assert schedule.take() is None
    schedule.done([0])
    assert schedule.take() == [1]


def test_what_a_dead_worker_had_is_the_next_job() -> None:
    schedule = Schedule([["a"], ["b"], ["c"]], [3, 2, 1], side_by_side=2, job_tokens=0)
    job = schedule.take()
    assert job == [0, 1]
    schedule.give_back(job)
    assert all_jobs(schedule) == [[0, 1], [2]]


def test_the_longest_come_first_and_short_ones_together() -> None:
    lengths = [1] * 100 + [50]
    schedule = Schedule([[str(number)] for number in range(101)], lengths, side_by_side=1, job_tokens=40)
    jobs = all_jobs(schedule)
    assert jobs[0] == [100]
    assert [len(job) for job in jobs[1:]] == [40, 40, 20]
    many = Schedule([[str(number)] for number in range(300)], [0] * 300, side_by_side=1, job_tokens=40)
    assert max(len(job) for job in all_jobs(many)) == MAX_DOCUMENTS


def test_each_document_is_done_once_and_after_what_it_waits_for() -> None:
    generator = random.Random(3)
    documents = [[str(generator.randrange(60)) for _ in range(generator.randrange(1, 5))] for _ in range(40)]
    schedule = Schedule(documents, [len(keys) for keys in documents], side_by_side=2, job_tokens=3)
    held: list[list[int]] = []
    done: list[int] = []
    while len(done) < len(documents):
        job = schedule.take()
        if job is not None and generator.random() < 0.2:
            schedule.give_back(job)
        elif job is not None:
            owners = {schedule.owner[key] for number in job for key in documents[number]} - set(job)
            assert owners <= set(done)
            held.append(job)
        if held and (job is None or generator.random() < 0.5):
            ended = held.pop(generator.randrange(len(held)))
            done += ended
            schedule.done(ended)
    assert sorted(done) == list(range(len(documents)))
