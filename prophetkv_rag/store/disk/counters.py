"""What a store has counted since it was opened, and what of that the directory's totals have got already."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable

from prophetkv_rag.forks import around_fork

logger = logging.getLogger(__name__)

MAX_LOGGED = 20
"""Bad blobs that are named in the log; a disk that dies has thousands."""


class Counters:
    """Counts since the store was opened. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._save_lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._saved: Counter[str] = Counter()
        self._logged: set[str] = set()
        around_fork(self, "_lock", in_child=Counters._begin_anew)

    def _begin_anew(self) -> None:
        self._counts.clear()  # the parent saves its own
        self._saved.clear()
        self._save_lock = threading.Lock()

    def add(self, **counts: int) -> None:
        """Count; by the names of `StoreStats`."""
        with self._lock:
            self._counts.update(counts)

    def add_corrupt(self, key: str) -> bool:
        """Count a bad blob; returns whether it is to be logged: each key once, and not without end."""
        with self._lock:
            self._counts["corrupt"] += 1
            if key in self._logged or len(self._logged) > MAX_LOGGED:
                return False
            self._logged.add(key)
            is_last = len(self._logged) > MAX_LOGGED
        if is_last:
            logger.warning(
                "more chunk caches cannot be used: from now on they are counted (`cache verify`), not logged"
            )
        return not is_last

    def values(self) -> dict[str, int]:
        """Return what has been counted."""
        with self._lock:
            return dict(self._counts)

    def save(self, write: Callable[[dict[str, int]], None], **counts: int) -> None:
        """Call `write` with what has been counted since the last time, and with other `counts` kept elsewhere."""
        with self._save_lock:  # not the other one: no query waits for what `write` may wait for
            with self._lock:
                now = self._counts | Counter(counts)
            write({name: count - self._saved[name] for name, count in now.items() if count != self._saved[name]})
            self._saved = now
