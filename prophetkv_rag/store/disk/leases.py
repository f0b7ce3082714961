"""Leases: what a query is loading is neither evicted nor collected, by any thread or process.

A process's leases are a file that it holds locked, with one key a line. A kill releases the lock, and whoever meets an
unlocked lease file deletes it; so leases need no clock and no time limit.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from prophetkv_rag.forks import around_fork, kept_from_children

if sys.platform != "win32":
    import fcntl

_UNNAMED = ".making"
_TRIES = 5


def writing(owner: str) -> str:
    """What a collection leases while it is written to: its references are older than the records that bear them out."""
    return f"writing {owner}"


class Leases:
    """The leases of one store, and a look at those of all others on the directory.

    Where files cannot be made (a read-only directory, Windows) leases hold within this store only.
    """

    def __init__(self, directory: Path, *, is_shared: bool = True) -> None:
        self._directory = directory
        self._is_shared = is_shared and sys.platform != "win32"
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        around_fork(self, "_lock", in_child=Leases._forget)

    @contextmanager
    def hold(self, keys: Iterable[str]) -> Iterator[None]:
        """Keep these chunks' blobs where they are while the block runs; or the references of an owner (`writing`)."""
        keys = set(keys)
        with self._lock:
            self._held.update(keys)
        file = self._write(keys) if self._is_shared and keys else None
        pid = os.getpid()
        try:
            with nullcontext() if file is None else kept_from_children(file[0]):
                try:
                    yield
                finally:
                    if file is not None and os.getpid() == pid:  # a child's parent still holds it
                        file[1].unlink(missing_ok=True)
        finally:
            with self._lock:
                self._held.subtract(keys)
                self._held = +self._held

    def held(self) -> set[str]:
        """Return the keys that anybody holds now; leases of processes that are gone are swept away."""
        with self._lock:
            keys = set(self._held)
        for path in self._directory.glob("*") if self._is_shared else ():
            keys |= self._read(path)
        keys.discard("")  # one that is just being made
        return keys

    def _forget(self) -> None:
        self._held.clear()  # what other threads hold, they hold in the parent

    def _write(self, keys: set[str]) -> tuple[int, Path] | None:
        """Make a lease file; `None` if that is not possible: this store's own leases hold all the same."""
        data = memoryview("\n".join(sorted(keys)).encode())
        for _ in range(_TRIES):
            path = self._directory / f"{secrets.token_hex(8)}.lease"
            unnamed = path.with_suffix(_UNNAMED)  # a lease is what has this name's other form: locked, and complete
            try:
                descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError:
                return None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left = data
                while left:
                    left = left[os.write(descriptor, left) :]
                unnamed.rename(path)
            except OSError as error:
                unnamed.unlink(missing_ok=True)
                os.close(descriptor)
                if not isinstance(error, (FileNotFoundError, BlockingIOError)):  # as the disk being full
                    return None
            else:
                return descriptor, path  # else a sweep met it before it was locked
        return None

    @staticmethod
    def _read(path: Path) -> set[str]:
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            return set()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody lives who holds it
            return set(os.read(descriptor, os.fstat(descriptor).st_size).decode(errors="replace").split("\n"))
        else:
            path.unlink(missing_ok=True)
            return set()
        finally:
            os.close(descriptor)
