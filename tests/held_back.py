"""Calls that begin at once, however busy the machine is: those that come first wait for the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prophetkv_rag import ProphetKVEngine

_LONGEST_S = 60.0


@contextmanager
def held_back(engine: ProphetKVEngine, count: int) -> Iterator[None]:
    """Keep the model from the calls that are made inside until so many wait for it, the first of them for its lock."""
    is_held, is_left = threading.Event(), threading.Event()

    def hold() -> None:
        with engine.model_lock:
            is_held.set()
            latest = time.monotonic() + _LONGEST_S
            while len(engine.turns._waiting) < count - 1 and not is_left.is_set() and time.monotonic() < latest:
                time.sleep(0.002)

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait()
    try:
        yield
    finally:
        is_left.set()
        holder.join()
