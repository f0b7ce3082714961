"""Whether something that has failed is worth asking again: not for a while, and twice as long after each failure.

The libraries for it (pybreaker, circuitbreaker, purgatory) know one pause, which does not grow, and wrap and raise in
calls; here outcomes are told later, by other threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from prophetkv_rag.forks import around_fork


class Breaker:
    """Closed (it is asked) until something fails; then open for a while, after which one caller may try.

    Safe to use from several threads.

    Args:
        first_s: Seconds that it is left alone after the first failure.
        longest_s: What that grows to while tries fail.
        clock: Seconds, of a clock that nobody sets.
    """

    def __init__(
        self, first_s: float = 15.0, longest_s: float = 600.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self._lock = threading.Lock()
        around_fork(self, "_lock")
        self._pause_s = first_s
        self._retry_at: float | None = None
        self._is_trying = False

    @property
    def is_open(self) -> bool:
        """Whether it is left alone, since something failed."""
        return self._retry_at is not None

    @property
    def wait_s(self) -> float:
        """Seconds until `allows` lets somebody through; 0 if that is now."""
        with self._lock:
            return 0.0 if self._retry_at is None else max(0.0, self._retry_at - self._clock())

    def allows(self) -> bool:
        """Whether to ask now; while open, one caller a pause is let through, whose outcome decides."""
        with self._lock:
            if self._retry_at is None:
                return True
            if self._clock() < self._retry_at:
                return False
            self._retry_at = self._clock() + self._pause_s  # should the outcome never be told
            self._is_trying = True
            return True

    def succeeded(self) -> bool:
        """Close, if that was the try; returns whether it was open. What was asked before the failure says nothing."""
        with self._lock:
            if not self._is_trying:
                return False
            self._retry_at, self._pause_s, self._is_trying = None, self._first_s, False
            return True

    def failed(self) -> bool:
        """Open, or stay open, for longer if that was the try; returns whether it was closed."""
        with self._lock:
            was_closed = self._retry_at is None
            if self._is_trying:
                self._pause_s = min(2 * self._pause_s, self._longest_s)
            if was_closed or self._is_trying:
                self._retry_at = self._clock() + self._pause_s
            self._is_trying = False
            return was_closed
