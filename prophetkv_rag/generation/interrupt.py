"""Stopping a call from outside: an event that somebody sets, and a time after which its answer is of no use.

A model's forward cannot be broken off, so a call is stopped where it is about to run one: before the prefill, before
each decoding step, and while it waits for the model that another caller runs.
"""

from __future__ import annotations

import math
import threading
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Literal

from prophetkv_rag.errors import InputError
from prophetkv_rag.generation.turns import Turns

InterruptReason = Literal["cancelled", "deadline"]

WAIT_SLICE_S = 0.05
"""Longest wait for the model before the event is looked at again."""


class Interrupted(Exception):  # not an error; it never leaves the engine
    """The call must stop; `reason` says why."""

    def __init__(self, reason: InterruptReason) -> None:
        super().__init__(reason)
        self.reason = reason


class InterruptibleLock(AbstractContextManager[None]):
    """A model's lock as one call sees it: taking it raises `Interrupted` once the call must stop."""

    def __init__(
        self,
        lock: threading.RLock,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
        turns: Turns | None = None,
        answer_tokens: int = 0,
    ) -> None:
        """Wrap a lock for one call.

        Args:
            lock: The model's lock.
            cancel: Stops the call when set.
            deadline_s: Seconds from now; 0 or less has passed already. `None` for no deadline.
            turns: Those of the calls on the model, which are taken along with the lock.
            answer_tokens: Longest answer.

        Raises:
            InputError: If the deadline is not a number.
        """
        if deadline_s is not None and math.isnan(deadline_s):
            msg = "deadline_s is not a number; give seconds, or None for no deadline"
            raise InputError(msg)
        self._lock = lock
        self._cancel = cancel
        self._ends_at = math.inf if deadline_s is None else time.monotonic() + deadline_s
        self.turns = turns
        self.answer_tokens, self.num_tokens = answer_tokens, 0
        self._has_turn: list[bool] = []

    @property
    def reason(self) -> InterruptReason | None:
        """Why the call must stop, or `None` while it may go on."""
        if self._cancel is not None and self._cancel.is_set():
            return "cancelled"
        return "deadline" if time.monotonic() >= self._ends_at else None

    def check(self) -> None:
        """Do nothing while the call may go on.

        Raises:
            Interrupted: If it must stop.
        """
        if (reason := self.reason) is not None:
            raise Interrupted(reason)

    def slice_s(self) -> float | None:
        """Return how long to wait before looking again whether the call must stop; `None` if it never must."""
        if self._cancel is None and self._ends_at == math.inf:
            return None
        return max(0.0, min(WAIT_SLICE_S, self._ends_at - time.monotonic()))

    def acquire(self) -> None:
        """Take the lock alone, without a turn.

        Raises:
            Interrupted: If the call must stop.
        """
        while True:
            self.check()
            wait = self.slice_s()
            if self._lock.acquire(timeout=-1 if wait is None else wait):
                break
        try:
            self.check()  # set while we waited for the last slice
        except Interrupted:
            self._lock.release()
            raise

    def read(self, prompt_tokens: int, context_window: int) -> None:
        """Say how long the prompt is, before its first turn: that and the answer decide when there is room for it."""
        self.num_tokens = min(prompt_tokens + self.answer_tokens, context_window)

    def leave(self) -> None:
        """Say that the call takes no more turns."""
        if self.turns is not None:
            self.turns.leave(self)

    def __enter__(self) -> None:
        has_turn = self.turns is not None and not self.turns.is_held_here
        if self.turns is not None and has_turn:
            self.turns.begin(self)
        else:
            self.acquire()
        self._has_turn.append(has_turn)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._has_turn.pop() and self.turns is not None:
            self.turns.end(self)
        else:
            self._lock.release()
