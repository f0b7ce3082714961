"""What a store could not write: one warning that says what to do, then a count."""

from __future__ import annotations

import logging
import threading

from prophetkv_rag.forks import around_fork

logger = logging.getLogger(__name__)


class Failures:
    """Failed writes of one store since it was opened. Safe to use from several threads.

    Attributes:
        is_failing: Whether the last write failed.
        caches: Caches that were computed, or would have been, and could not be kept.
        reason: What the store said first; "" while nothing has failed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_failing = False
        self.caches = 0
        self.reason = ""
        around_fork(self, "_lock", in_child=Failures._begin_anew)

    def _begin_anew(self) -> None:
        self.caches = 0  # the parent counts its own

    def note(self, error: Exception, *, caches: int = 0) -> None:
        """Note a write that failed, and how many caches it leaves unkept; the first is logged."""
        with self._lock:
            is_first = not self.reason
            self.is_failing = True
            self.caches += caches
            self.reason = self.reason or str(error) or type(error).__name__
        if is_first:
            logger.warning(
                "chunk caches cannot be stored: they are computed again whenever a prompt has them, which changes no "
                "answer. Make room, or make the directory writable, and add the chunks again (`prophetkv-rag cache "
                "warm`). The first error was: %s",
                error,
            )
        else:
            logger.debug("chunk caches cannot be stored: %s", error)

    def note_elsewhere(self, error: Exception, place: str) -> None:
        """Note a write to the disk that failed while the cache is kept in another place; the first is logged."""
        with self._lock:
            is_first = not self.reason
            self.reason = self.reason or str(error) or type(error).__name__
        logger.log(
            logging.WARNING if is_first else logging.DEBUG,
            "chunk caches cannot be stored on the disk: they go to %s alone, as long as that takes them, which changes "
            "no answer. Make room, or make the directory writable. The first error was: %s",
            place,
            error,
        )

    def count(self, caches: int) -> None:
        """Count caches that were not even tried because of an earlier failure."""
        with self._lock:
            self.caches += caches

    def end(self) -> None:
        """Note that a write succeeded."""
        self.is_failing = False
