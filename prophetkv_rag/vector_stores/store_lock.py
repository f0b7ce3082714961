"""One lock for each vector store, whoever wraps it: held by threads and by awaiting callers, over a whole call."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from prophetkv_rag.forks import around_fork

POLL_S = 0.005
"""Between two looks of an awaiting caller. Waiting in a thread could take all threads of a pool."""


class StoreLock:
    """Held while records and caches are changed together; other processes are not kept out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock.

        Where the one who holds it awaits something in the very event loop that calls here, waiting would be for ever:
        the call goes ahead then (what the other one is writing keeps its caches, see `StoreLink.carried`).
        """
        if self._loop is not None and self._loop is _running_loop():
            yield
            return
        with self._lock:
            yield

    @asynccontextmanager
    async def aheld(self) -> AsyncIterator[None]:
        """Hold the lock, and leave the event loop to others while it is waited for."""
        while not self._lock.acquire(blocking=False):
            await asyncio.sleep(POLL_S)
        self._loop = asyncio.get_running_loop()
        try:
            yield
        finally:
            self._loop = None
            self._lock.release()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


# A lock that nobody holds or waits for goes away.
_LOCKS: weakref.WeakValueDictionary[tuple[int, str], StoreLock] = weakref.WeakValueDictionary()
_GUARD = threading.Lock()


def _forget(locks: weakref.WeakValueDictionary[tuple[int, str], StoreLock]) -> None:
    """Begin with none in a child: whoever holds one goes on in the parent alone."""
    global _GUARD
    locks.clear()
    _GUARD = threading.Lock()


around_fork(_LOCKS, in_child=_forget)


def store_lock(place: object, owner: str) -> StoreLock:
    """Return the lock of an owner whose caches are kept in a place."""
    with _GUARD:
        key = (id(place), owner)
        lock = _LOCKS.get(key)
        if lock is None:
            lock = _LOCKS[key] = StoreLock()
        return lock
