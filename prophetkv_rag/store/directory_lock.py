"""A lock on a directory, between threads and between processes."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prophetkv_rag.forks import around_fork, kept_from_children

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""What file systems say that have no locks: NFS without its lock daemon, CIFS with `nobrl`, some of FUSE's."""


class DirectoryLock:
    """Shared by every write, exclusive for deleting and repairing, so that repair never mistakes a write under way.

    A kill releases it. On Windows, and where a file system has no locks (which is said once), it holds between the
    threads of one process only: there, one process at a time.

    By `flock` itself: filelock's shared lock is a transaction of SQLite, which takes 30 to 60 times as long, is polled
    for, and raises in a child that was forked meanwhile and where threads share it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = _threads_lock(path)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Held while a blob and its catalog row are written; several may hold it at once."""
        with self._held(is_exclusive=False):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Held alone. Not re-entrant."""
        with self._held(is_exclusive=True):
            yield

    @contextmanager
    def _held(self, *, is_exclusive: bool) -> Iterator[None]:
        with kept_from_children(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)) as descriptor:
            pid = os.getpid()
            if not _lock(descriptor, self._path, is_exclusive=is_exclusive):
                with self._threads.held(is_exclusive=is_exclusive):
                    yield
                return
            try:
                yield
            finally:
                if os.getpid() == pid:  # a copy of the descriptor in a child would hold it on otherwise
                    fcntl.flock(descriptor, fcntl.LOCK_UN)


def has_locks(directory: Path) -> bool:
    """Whether the file system of a directory has locks of the kind that SQLite uses; if not, that is said once."""
    if sys.platform == "win32":
        return True  # SQLite has its own there
    try:
        with open(os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600), "wb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            return True  # somebody has it, or it is not to be written to
        _warn(directory, error)
        return False
    return True


def _lock(descriptor: int, path: Path, *, is_exclusive: bool) -> bool:
    """Wait for the lock; returns whether the file system has locks at all."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if is_exclusive else fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn(path.parent, error)
        return False
    return True


_warned: set[Path] = set()


def _warn(directory: Path, error: OSError) -> None:
    if directory not in _warned:
        _warned.add(directory)
        logger.warning(
            "the file system of %s has no file locks (%s): use this directory from one process at a time",
            directory,
            error.strerror,
        )


class _ThreadsLock:
    """Shared or exclusive, between the threads of this process."""

    def __init__(self) -> None:
        self._begin_anew()
        around_fork(self, in_child=_ThreadsLock._begin_anew)

    def _begin_anew(self) -> None:
        self._changed = threading.Condition()
        self._holders = 0  # -1: one, exclusively

    @contextmanager
    def held(self, *, is_exclusive: bool) -> Iterator[None]:
        changed = self._changed
        with changed:
            changed.wait_for(lambda: self._holders == 0 if is_exclusive else self._holders >= 0)
            self._holders = -1 if is_exclusive else self._holders + 1
        try:
            yield
        finally:
            with changed:
                if changed is self._changed:  # else this is a child, where nobody held anything
                    self._holders = 0 if is_exclusive else self._holders - 1
                changed.notify_all()


_threads_locks: weakref.WeakValueDictionary[Path, _ThreadsLock] = weakref.WeakValueDictionary()


def _threads_lock(path: Path) -> _ThreadsLock:
    """Return the one lock of a path in this process."""
    made = _ThreadsLock()
    return _threads_locks.setdefault(path.absolute(), made)
