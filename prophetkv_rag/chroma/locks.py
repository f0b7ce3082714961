"""One lock for each collection, whoever wraps it."""

from __future__ import annotations

import threading
import weakref

# By collection id: several proxies may wrap one collection. A lock that nobody holds or waits for goes away.
_LOCKS: weakref.WeakValueDictionary[str, threading.RLock] = weakref.WeakValueDictionary()
_LOCKS_GUARD = threading.Lock()


def collection_lock(collection_id: str) -> threading.RLock:
    """Return the lock held while records and references are changed together; other processes are not kept out."""
    with _LOCKS_GUARD:
        lock = _LOCKS.get(collection_id)
        if lock is None:
            lock = _LOCKS[collection_id] = threading.RLock()
        return lock
