"""A clock that only a test moves, so that a deadline passes at a known step and on no machine earlier or later."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from prophetkv_rag.generation import interrupt


class Clock:
    """Stands in for the module `time` where calls are stopped: `now` is what it says, and it notes who asks."""

    def __init__(self) -> None:
        self.now = 0.0
        self._asked = threading.Semaphore(0)

    def monotonic(self) -> float:
        self._asked.release()
        return self.now

    def pass_all_deadlines(self, *_: Any) -> None:
        self.now += 10_000

    def wait_until_asked(self, times: int) -> None:
        """Wait until a call has asked so often: one that waits for the model asks before each slice of its wait."""
        for _ in range(times):
            self._asked.acquire()


def stop_the_clock(patch: pytest.MonkeyPatch) -> Clock:
    """Give calls' deadlines a clock that stands still until the test moves it."""
    clock = Clock()
    patch.setattr(interrupt, "time", clock)
    return clock


@contextmanager
def at_forward(module: Any, number: int, action: Any) -> Iterator[list[int]]:
    """Call `action()` when the module's `number`-th forward from now has ended; yields the forwards so far."""
    ended: list[int] = []

    def note(*_: Any) -> None:
        ended.append(len(ended) + 1)
        if len(ended) == number:
            action()

    hook = module.register_forward_hook(note)
    try:
        yield ended
    finally:
        hook.remove()
