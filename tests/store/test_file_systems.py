"""File systems that lack something (CIFS, NFS without a lock daemon, FUSE): caches are stored, and it is said once."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag.errors import StoreError
from prophetkv_rag.store import DirectoryLock, directory_lock, files, write_file
from prophetkv_rag.store.disk import DiskStore
from tests.forked import Elsewhere, forked
from tests.store.caches import FINGERPRINT, found_in, key_of, make_cache

NO_SYNC = [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF]
NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL]


@pytest.fixture(autouse=True)
def _nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_said", set())
    monkeypatch.setattr(directory_lock, "_warned", set())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def failing(code: int, *, of_directories: bool = False) -> Callable[..., None]:
    """What stands in for a call that the file system does not know; for files and directories, or for these only."""
    real = os.fsync

    def call(descriptor: Any, *more: Any) -> None:
        if of_directories and not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            real(descriptor)
            return
        raise OSError(code, os.strerror(code))

    return call


def put(store: DiskStore, *seeds: int) -> None:
    for seed in seeds:
        store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)


@pytest.mark.parametrize("code", NO_SYNC)
def test_directories_that_cannot_be_synced(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(os, "fsync", failing(code, of_directories=True))
    store = DiskStore(tmp_path, ram_bytes=0)
    put(store, 1, 2, 3)
    assert found_in(store, 1, 2, 3) == [True] * 3
    assert store.stats().failed_writes == 0
    assert [os.strerror(code) in message for message in said()] == [True]


def test_files_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    write_file(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_sync_that_fails_is_a_write_that_failed(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path, ram_bytes=0)
    monkeypatch.setattr(os, "fsync", failing(code))
    with pytest.raises(StoreError):
        put(store, 1)
    assert not store.files.path(key_of(1)).exists()
    assert found_in(store, 1) == [False]


@pytest.mark.parametrize("code", NO_LOCKS)
def test_no_locks_at_all(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(code))
    monkeypatch.setattr(fcntl, "lockf", failing(code))
    store = DiskStore(tmp_path, ram_bytes=0, max_bytes=1 << 20)
    put(store, 1, 2, 3)
    with store.lease([key_of(1)]):
        assert store.leases.held() == {key_of(1)}
        store.delete([key_of(2)])
    store.add_references("somebody", [key_of(4)])
    store.put_soon(key_of(4), make_cache(4), fingerprint=FINGERPRINT)
    store.flush()
    assert found_in(store, 1, 2, 3, 4) == [True, False, True, True]
    assert store.verify().num_faults == 0
    store.close()
    again = DiskStore(tmp_path, ram_bytes=0)
    assert found_in(again, 1, 3) == [True, True]
    assert [message for message in said() if "use this directory from one process at a time" in message] == said()
    assert len(said()) == 1


def test_a_catalog_that_was_made_with_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that was copied to a share; and back again."""
    store = DiskStore(tmp_path)
    put(store, 1)
    store.close()
    with monkeypatch.context() as without:
        without.setattr(fcntl, "flock", failing(errno.ENOLCK))
        without.setattr(fcntl, "lockf", failing(errno.ENOLCK))
        store = DiskStore(tmp_path)
        put(store, 2)
        assert found_in(store, 1, 2) == [True, True]
        store.close()
    store = DiskStore(tmp_path)
    assert found_in(store, 1, 2) == [True, True]
    assert store.verify().num_faults == 0


def test_the_catalog_asks_for_no_locks_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own calls are not to be caught here, but another process tells whether it holds anything."""
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "lockf", failing(errno.ENOLCK))
    store = DiskStore(tmp_path)
    other = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('PRAGMA user_version').fetchone()"
    with store.catalog.transaction() as run:
        run.execute("UPDATE state SET value = value")
        found = subprocess.run(
            [sys.executable, "-c", other, tmp_path / "catalog.sqlite"], capture_output=True, text=True, check=False
        )
    assert found.stderr == ""


def test_threads_read_and_write_a_catalog_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "lockf", failing(errno.ENOLCK))
    store, failed = DiskStore(tmp_path, ram_bytes=0), []

    def work(first: int) -> None:
        try:
            for seed in range(first, first + 10):
                put(store, seed)
                assert found_in(store, seed) == [True]
                store.delete([key_of(seed)] if seed % 2 else [])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert store.stats().chunks == 15
    assert store.verify().num_faults == 0


def test_any_other_failure_to_lock_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), DirectoryLock(tmp_path / "lock").exclusive():
        pass


class TestWithinAProcess:
    """Where a file system has no locks, the threads of a process keep out of each other's way all the same."""

    @pytest.fixture(autouse=True)
    def _no_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))

    @pytest.mark.parametrize(("one", "other"), [("exclusive", "shared"), ("shared", "exclusive")])
    def test_one_waits_for_the_other(self, one: str, other: str, tmp_path: Path) -> None:
        lock, same, order = DirectoryLock(tmp_path / "lock"), DirectoryLock(tmp_path / "lock"), []
        holder = Elsewhere(getattr(lock, one))

        def wait() -> None:
            with getattr(same, other)():
                order.append("waited")

        waiting = threading.Thread(target=wait)
        waiting.start()
        order.append("still held")
        holder.leave()
        waiting.join()
        assert order == ["still held", "waited"]

    def test_two_may_share(self, tmp_path: Path) -> None:
        lock = DirectoryLock(tmp_path / "lock")
        holder = Elsewhere(lock.shared)
        with lock.shared():
            pass
        holder.leave()
        with lock.exclusive():
            pass

    def test_a_child_begins_with_nobody_inside(self, tmp_path: Path) -> None:
        lock = DirectoryLock(tmp_path / "lock")

        def in_child() -> bool:
            with lock.exclusive():
                return True

        holder = Elsewhere(lock.exclusive)
        assert forked(in_child) is True
        holder.leave()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="macOS and Windows have no posix_fadvise")
def test_advice_that_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fadvise", failing(errno.ENOSYS))
    store = DiskStore(tmp_path, ram_bytes=0)
    put(store, 1)
    assert found_in(store, 1) == [True]
    assert store.stats().corrupt == 0
