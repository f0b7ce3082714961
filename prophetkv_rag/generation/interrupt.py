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
        self, lock: threading.RLock, cancel: threading.Event | None = None, deadline_s: float | None = None
    ) -> None:
        """Wrap a lock for one call.

        Args:
            lock: The model's lock.
            cancel: Stops the call when set.
            deadline_s: Seconds from now; 0 or less has passed already. `None` for no deadline.

        Raises:
            InputError: If the deadline is not a number.
        """
        if deadline_s is not None and math.isnan(deadline_s):
            msg = "deadline_s is not a number; give seconds, or None for no deadline"
            raise InputError(msg)
        self._lock = lock
        self._cancel = cancel
        self._ends_at = math.inf if deadline_s is None else time.monotonic() + deadline_s

    @property
    def reason(self) -> InterruptReason | None:
        """Why the call must stop, or `None` while it may go on."""
        if self._cancel is not None and self._cancel.is_set():
            return "cancelled"
        return "deadline" if time.monotonic() >= self._ends_at else None

    def __enter__(self) -> None:
        is_plain = self._cancel is None and self._ends_at == math.inf
        while True:
            reason = self.reason
            if reason is not None:
                raise Interrupted(reason)
            wait = -1 if is_plain else max(0.0, min(WAIT_SLICE_S, self._ends_at - time.monotonic()))
            if self._lock.acquire(timeout=wait):
                break
        if (reason := self.reason) is not None:  # set while we waited for the last slice
            self._lock.release()
            raise Interrupted(reason)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
