"""One lock for each collection, whoever wraps it."""

from __future__ import annotations

import threading
import weakref

from prophetkv_rag.forks import around_fork

# By collection id: several proxies may wrap one collection. A lock that nobody holds or waits for goes away.
_LOCKS: weakref.WeakValueDictionary[str, threading.RLock] = weakref.WeakValueDictionary()
_LOCKS_GUARD = threading.Lock()


def _forget(locks: weakref.WeakValueDictionary[str, threading.RLock]) -> None:
    """Begin with none in a child: whoever holds one may do so for minutes, and goes on in the parent alone."""
    global _LOCKS_GUARD
    locks.clear()
    _LOCKS_GUARD = threading.Lock()


around_fork(_LOCKS, in_child=_forget)


def collection_lock(collection_id: str) -> threading.RLock:
    """Return the lock held while records and references are changed together; other processes are not kept out."""
    with _LOCKS_GUARD:
        lock = _LOCKS.get(collection_id)
        if lock is None:
            lock = _LOCKS[collection_id] = threading.RLock()
        return lock
