"""Files of a cache directory: private, and written completely or not at all."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np

logger = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".tmp"

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
"""What file systems say that have no `fsync` for a directory, or none at all: CIFS, shared folders, some of FUSE's."""
_said: set[int] = set()


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
            _sync(descriptor, path.parent)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def touch_private(path: Path) -> None:
    """Make an empty file that only its owner may read, where there is none."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


def _sync_directory(path: Path) -> None:
    if sys.platform == "win32":  # directories cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor, path)
    finally:
        os.close(descriptor)


def _sync(descriptor: int, directory: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk, where the file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        if error.errno not in _said:
            _said.add(error.errno)
            logger.warning(
                "the file system of %s cannot be told to write at once (fsync: %s): what is stored there is stored, "
                "but a power failure may take the last of it, which is then computed again",
                directory,
                error.strerror,
            )
