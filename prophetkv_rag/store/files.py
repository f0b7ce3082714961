"""Files of a cache directory: private, written completely or not at all, and guarded across processes."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

if sys.platform != "win32":
    import fcntl

TEMPORARY_SUFFIX = ".tmp"


def make_private_directory(path: Path) -> None:
    """Make a directory that only its owner may read, where there is none, and check that files can be made in it.

    Raises:
        OSError: If it cannot be made or written to.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass


def can_write(directory: Path, num_bytes: int) -> bool:
    """Whether a file of that size can be written there now; it is written, and gone at once."""
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            view = memoryview(bytes(num_bytes))
            while view:
                view = view[file.write(view) :]
    except OSError:
        return False
    return True


class Source(Protocol):
    """What is read from where it stands: a file, or what takes one apart."""

    def readinto(self, view: memoryview, /) -> int | None:
        """Fill as much of `view` as comes at once; returns how many bytes, 0 at the end."""


def read_fully(file: Source, view: memoryview) -> int:
    """Fill `view` from where the file stands; returns how many bytes there were."""
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])  # at most 2 GiB a call
        if not count:
            break
        filled += count
    return filled


def read_into_fresh(file: Source, num_bytes: int) -> memoryview:
    """Read up to `num_bytes` into one fresh, writable buffer: a single copy, with nothing zeroed before."""
    view = np.empty(num_bytes, dtype=np.uint8).data
    return view[: read_fully(file, view)]


def write_file(path: Path, data: bytes, *, temporary_directory: Path | None = None) -> None:
    """Write a file so that, after any crash, it is there completely or not at all (temporary file, fsync, rename).

    Args:
        path: Where it is to be; its directory is made if it is not there.
        data: All of it.
        temporary_directory: Where it is written first, on the same file system; beside it by default.
    """
    if not path.parent.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _sync_directory(path.parent.parent)
    temporary = (temporary_directory or path.parent) / f"{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def touch_private(path: Path) -> None:
    """Make an empty file that only its owner may read, where there is none."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


class DirectoryLock:
    """Shared by every write, exclusive for deleting and repairing, so that repair never mistakes a write under way.

    A kill releases it. On Windows it does nothing: there, repair only while no other process writes.

    By `flock` itself: filelock's shared lock is a transaction of SQLite, which takes 30 to 60 times as long, is polled
    for, and raises in a child that was forked meanwhile and where threads share it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

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
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)  # a lock belongs to one opening of the file
        try:
            if sys.platform != "win32":
                fcntl.flock(descriptor, fcntl.LOCK_EX if is_exclusive else fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)


def _sync_directory(path: Path) -> None:
    if sys.platform == "win32":  # directories cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
