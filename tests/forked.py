"""Running a function in a forked child, as Celery, gunicorn --preload and multiprocessing do."""

from __future__ import annotations

import json
import os
import select
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest

NOT_FOR_EVER_S = 60.0
"""A net: a child that has not answered by then hangs."""


class Child:
    """A forked child that runs a function, once it is told to, and ends.

    Args:
        action: Called in the child; what it returns must be JSON.
        waits: Whether it waits for `result` before it begins.
    """

    def __init__(self, action: Callable[[], Any], *, waits: bool = False) -> None:
        self._answer, write = os.pipe()
        go, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._go)
                if waits:
                    os.read(go, 1)
                answer = {"value": action()}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            with os.fdopen(write, "w") as file:
                json.dump(answer, file)
            os._exit(0)
        os.close(write)
        os.close(go)

    def result(self) -> Any:
        """What the function returned; a test fails where it raised, or hangs."""
        os.close(self._go)
        ready: list[int] = []
        try:
            ready, _, _ = select.select([self._answer], [], [], NOT_FOR_EVER_S)
        finally:
            if not ready:  # nor may it outlive a test that was stopped meanwhile
                os.kill(self.pid, signal.SIGKILL)
        with os.fdopen(self._answer) as file:
            text = file.read()
        os.waitpid(self.pid, 0)
        if not text:
            pytest.fail("the forked child hangs")
        answer = json.loads(text)
        if "error" in answer:
            pytest.fail(f"in the forked child: {answer['error']}")
        return answer["value"]


def forked(action: Callable[[], Any]) -> Any:
    """Call a function in a forked child; returns what it returned."""
    return Child(action).result()


class Elsewhere:
    """A thread that is inside a `with` block from when this is made until `leave`."""

    def __init__(self, make_block: Callable[[], Any]) -> None:
        self._is_inside, self._may_leave = threading.Event(), threading.Event()

        def stay() -> None:
            with make_block():
                self._is_inside.set()
                self._may_leave.wait(NOT_FOR_EVER_S)

        self._thread = threading.Thread(target=stay, daemon=True)
        self._thread.start()
        assert self._is_inside.wait(NOT_FOR_EVER_S)

    def let_go(self) -> None:
        """Tell the thread to leave the block, some time soon."""
        self._may_leave.set()

    def leave(self) -> None:
        """Have the thread leave the block."""
        self.let_go()
        self._thread.join(NOT_FOR_EVER_S)
        assert not self._thread.is_alive()
