"""Who is held back until its caches are in RAM: until all ranks have them, no longer than said, never in a circle."""

from __future__ import annotations

from collections import Counter

import pytest

from prophetkv_rag.integrations.vllm.awaited import AwaitedCaches
from prophetkv_rag.integrations.vllm.messages import StepReport


class Waiting(AwaitedCaches):
    """Caches of one byte each; `now` is the time."""

    def __init__(self, ram_bytes=100, seconds=1.0):
        self.now, self.counts = 0.0, Counter()
        super().__init__(
            seconds,
            ram_bytes,
            size_of=lambda key: 1,
            count=lambda name, value: self.counts.update({name: value}),
            clock=lambda: self.now,
        )

    def step(self, *reports):
        """Return keys that the workers are told to read; then learn of what they say, one report a rank."""
        jobs = self.next_jobs()
        self.say(*(reports or [StepReport()]))
        return [job.keys for job in jobs]

    def say(self, first, *others):
        for other in others:
            first = first.aggregate(other)
        self.learn(first)

    def is_filled(self, name, keys):
        return self.is_ready(name, list(keys), "")


def test_a_request_waits_until_its_caches_are_read():
    waiting = Waiting()
    waiting.expect("a", "xy", "")
    assert not waiting.is_filled("a", "xy")
    assert waiting.step() == [("x", "y")]
    assert not waiting.is_filled("a", "xy")
    waiting.now = 0.5
    waiting.say(StepReport(read=[1], came=["x", "y"]))
    assert waiting.is_filled("a", "xy")
    assert waiting.counts == {"read_ahead_waits": 1, "read_ahead_seconds": 0.5}


def test_what_all_ranks_have_in_ram_is_not_waited_for():
    waiting = Waiting()
    waiting.say(StepReport(came=["x", "y"]), StepReport(came=["x"]))
    waiting.expect("a", "x", "")
    assert waiting.is_filled("a", "x")
    waiting.finish("a")
    assert waiting.step(StepReport(went=["x"]), StepReport()) == []
    waiting.expect("a", "x", "")
    assert not waiting.is_filled("a", "x")
    waiting.expect("b", "y", "")
    assert not waiting.is_filled("b", "y")
    waiting.say(StepReport(came=["x"]), StepReport(came=["y"]))
    assert waiting.is_filled("a", "x")
    assert waiting.is_filled("b", "y")


def test_every_rank_has_to_have_read():
    waiting = Waiting()
    waiting.expect("a", "x", "")
    waiting.step(StepReport(), StepReport())
    waiting.say(StepReport(read=[1], came=["x"]), StepReport())
    assert not waiting.is_filled("a", "x")
    waiting.say(StepReport(), StepReport(read=[1]))  # it could not be read there
    assert waiting.is_filled("a", "x")


def test_nobody_waits_longer_than_said():
    waiting = Waiting(seconds=2.0)
    waiting.expect("a", "x", "")
    waiting.now = 10.0
    assert not waiting.is_filled("a", "x")  # time in vLLM's queue is not counted
    waiting.now = 11.9
    assert not waiting.is_filled("a", "x")
    waiting.now = 12.0
    assert waiting.is_filled("a", "x")
    assert waiting.is_filled("a", "x")
    assert waiting.counts == {"read_ahead_waits": 1, "read_ahead_late": 1, "read_ahead_seconds": 2.0}
    never = Waiting(seconds=0)
    never.expect("a", "x", "")
    assert never.is_filled("a", "x")
    assert never.step() == [("x",)]


def test_what_waits_is_no_more_than_fits():
    waiting = Waiting(ram_bytes=3)
    waiting.expect("a", "xy", "")
    waiting.expect("b", "yz", "")  # y is there once
    waiting.expect("c", "w", "")
    assert waiting.step() == [("x", "y"), ("y", "z")]
    waiting.say(StepReport(read=[1, 2], came=["x", "y", "z"]))
    assert waiting.is_filled("a", "xy")
    assert waiting.step() == []  # it is there until the step that fills it
    waiting.finish("a")
    assert waiting.step() == []  # of this step, too
    assert waiting.step() == [("w",)]
    waiting.finish("b")
    waiting.finish("c")
    waiting.step()
    waiting.expect("d", "xyz", "")
    assert waiting.step() == [("x", "y", "z")]
    waiting.finish("d")  # aborted
    waiting.step()
    assert (len(waiting), waiting._sizes, waiting._users) == (0, {}, {})


def test_what_a_step_fills_from_ram_has_room_beside_what_it_begins_to_read():
    waiting = Waiting(ram_bytes=3)
    waiting.say(StepReport(came=["x", "y"]))
    waiting.expect("warm", "xy", "")
    waiting.expect("cold", "zw", "")
    assert waiting.is_filled("warm", "xy")
    waiting.finish("warm")  # it was never read for
    assert waiting.step() == []
    assert waiting.step() == [("z", "w")]


def test_what_never_fits_is_not_waited_for():
    waiting = Waiting(ram_bytes=3)
    waiting.expect("a", "wxyz", "")
    assert waiting.is_filled("a", "wxyz")
    assert waiting.step() == []
    assert not waiting.counts


def test_what_was_encoded_meanwhile_is_waited_for_only_where_it_is_not_in_ram():
    waiting = Waiting()
    waiting.expect("a", "x", "")
    waiting.step(StepReport(), StepReport())
    waiting.say(StepReport(read=[1], came=["x", "new"]), StepReport(read=[1], came=["x"]))
    assert not waiting.is_filled("a", ["x", "new"])
    assert waiting.step(StepReport(), StepReport(came=["new"])) == [("x", "new")]
    assert waiting.is_filled("a", ["x", "new"])


def test_a_job_that_a_request_had_before_does_not_count():
    waiting = Waiting()
    waiting.expect("a", "x", "")
    waiting.step()
    waiting.expect("a", "xy", "")
    waiting.step(StepReport(read=[1], came=["x"]))
    assert not waiting.is_filled("a", "xy")
    waiting.say(StepReport(read=[2]))
    assert waiting.is_filled("a", "xy")


@pytest.mark.parametrize("is_held_back", [False, True])
def test_an_aborted_request_leaves_nothing(is_held_back):
    waiting = Waiting()
    waiting.expect("a", "x", "")
    assert not (is_held_back and waiting.is_filled("a", "x"))
    waiting.step()
    waiting.now = 0.25
    waiting.finish("a")
    waiting.step(StepReport(read=[1], came=["x"]))
    assert (len(waiting), waiting._being_read, waiting._sizes) == (0, {}, {})
    assert waiting.counts == ({"read_ahead_waits": 1, "read_ahead_seconds": 0.25} if is_held_back else {})
