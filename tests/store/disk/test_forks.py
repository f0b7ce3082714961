"""A store that was opened before a fork: right in the parent and in the child, and nothing is corrupt or done twice."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag.errors import StoreError
from prophetkv_rag.store import DirectoryLock, TextEntry
from prophetkv_rag.store.catalog import Catalog, CatalogRow, all_counts
from prophetkv_rag.store.disk import DiskStore, TieredStore
from prophetkv_rag.store.disk.leases import Leases
from tests.forked import Child, Elsewhere, forked
from tests.store.caches import FINGERPRINT, found_in, key_of, make_cache

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no os.fork")


def put(store: DiskStore, *seeds: int) -> None:
    for seed in seeds:
        store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)


def put_soon(store: DiskStore, *seeds: int) -> None:
    for seed in seeds:
        store.add_references("somebody", [key_of(seed)])
        store.put_soon(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)


def used(store: DiskStore) -> dict[str, int]:
    with store.catalog.transaction(is_write=False) as run:
        return dict(run.execute("SELECT key, uses FROM chunks"))


def test_flush_returns_in_the_child_and_what_it_wrote_is_there(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    put_soon(store, 1)
    store.flush()  # its thread has run

    def in_child() -> list[bool]:
        put_soon(store, 2)
        store.read_ahead([key_of(1)], fingerprint=FINGERPRINT)
        store.flush()
        return found_in(store, 1, 2)

    assert forked(in_child) == [True, True]
    put_soon(store, 3)
    store.flush()
    assert found_in(store, 1, 2, 3) == [True] * 3
    assert store.verify().num_faults == 0
    assert store.stats().chunks == 3


def test_a_store_that_was_closed_stays_closed_in_the_child(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    put(store, 1)
    store.close()

    def in_child() -> str:
        store.flush()
        try:
            store.stats()
        except StoreError as error:
            return str(error)
        return "it was opened again"

    assert "closed" in forked(in_child)


def test_what_waits_is_written_by_the_parent_alone(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, ram_bytes=0)
    deleting = Elsewhere(store.directory_lock.exclusive)  # the store's thread waits for it
    put_soon(store, 1, 2)
    child = Child(lambda: [store.flush(), found_in(store, 1, 2), store._later._waiting])
    assert child.result() == [None, [False, False], {}]
    deleting.leave()
    store.flush()
    assert found_in(store, 1, 2) == [True, True]


def test_no_connection_of_the_catalog_crosses_a_fork(tmp_path: Path) -> None:
    """SQLite's own rule: what a child inherits makes it believe that it holds locks which are the parent's."""
    store = DiskStore(tmp_path)
    put(store, 1)

    def inherited() -> list[str]:
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if link.exists() and str(tmp_path) in os.readlink(link)]

    assert any("catalog.sqlite" in path for path in inherited())
    assert forked(inherited) == []
    assert found_in(store, 1) == [True]


def test_parent_and_children_write_to_one_catalog(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    put(store, 0)

    def write(first: int) -> str:
        put(store, *range(first, first + 15))
        return store.catalog.check()

    children = [Child(lambda first=first: write(first)) for first in (100, 200, 300)]
    assert write(400) == ""
    assert [child.result() for child in children] == [""] * 3
    assert store.stats().chunks == 1 + 4 * 15
    assert store.verify().num_faults == 0


def test_a_fork_waits_for_a_transaction(tmp_path: Path) -> None:
    """It is whole on disk then, and not half done in a child that has nobody to finish it."""
    catalog = Catalog(tmp_path / "catalog.sqlite")

    def rows() -> int:
        catalog.upsert(CatalogRow(key_of(9), FINGERPRINT, 5, 0), None)
        return len(catalog.rows())

    class Writing:
        def __enter__(self) -> None:
            self.transaction = catalog.transaction()
            self.transaction.__enter__()
            catalog.upsert(CatalogRow(key_of(1), FINGERPRINT, 5, 0), None)

        def __exit__(self, *error: object) -> None:
            catalog.upsert(CatalogRow(key_of(2), FINGERPRINT, 5, 0), TextEntry(1, 2, "00"))
            self.transaction.__exit__(None, None, None)

    writing = Elsewhere(Writing)
    os.register_at_fork(before=writing.let_go)  # it runs before ours, which waits
    assert forked(rows) == 3
    writing.leave()
    assert len(catalog.rows()) == 3
    assert catalog.check() == ""


def test_a_fork_from_within_a_transaction(tmp_path: Path) -> None:
    """Who is in the middle of one cannot have it closed: the child says that it cannot go on, the parent goes on."""
    catalog = Catalog(tmp_path / "catalog.sqlite")

    def in_child() -> str:
        try:
            catalog.rows()
        except StoreError as error:
            return str(error)
        return "it went on"

    with catalog.transaction():
        catalog.upsert(CatalogRow(key_of(1), FINGERPRINT, 5, 0), None)
        assert "open the store after the fork, in each process" in forked(in_child)
    assert [row.key for row in catalog.rows()] == [key_of(1)]
    assert catalog.check() == ""


def test_a_catalog_that_is_read_while_processes_are_forked(tmp_path: Path) -> None:
    """A reader may come between the closing and its own opening: it opens the file, and never meets a closed one."""
    catalog, is_over, failed = Catalog(tmp_path / "catalog.sqlite"), threading.Event(), []
    catalog.upsert(CatalogRow(key_of(1), FINGERPRINT, 5, 0), None)

    def read() -> None:
        try:
            while not is_over.is_set():
                assert len(catalog.rows()) == 1
        except BaseException as error:
            failed.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    counted = [forked(lambda: len(catalog.rows())) for _ in range(25)]
    is_over.set()
    for reader in readers:
        reader.join()
    assert failed == []
    assert counted == [1] * 25


def test_a_childs_copy_does_not_keep_the_parents_lock(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path / "lock")
    holder = Elsewhere(lock.exclusive)
    child = Child(lambda: None, waits=True)  # lives on with whatever it has inherited
    holder.leave()
    with lock.exclusive():
        pass
    child.result()


def test_a_child_waits_for_the_parents_lock(tmp_path: Path) -> None:
    lock, said = DirectoryLock(tmp_path / "lock"), tmp_path / "said"

    def in_child() -> bool:
        with lock.shared():
            return said.exists()

    with lock.exclusive():
        child = Child(in_child)
        said.touch()
    assert child.result() is True


def test_leases_of_the_parent_are_the_parents(tmp_path: Path) -> None:
    leases = Leases(tmp_path)

    def in_child() -> list[str]:
        return sorted(leases.held())

    other = Elsewhere(lambda: leases.hold(["a"]))
    assert forked(in_child) == ["a"]  # by its file, which is still there and locked afterwards
    assert sorted(leases.held()) == ["a"]
    child = Child(in_child, waits=True)
    other.leave()
    assert leases.held() == set()
    assert child.result() == []


def test_a_lease_that_is_left_in_the_child_is_held_on_in_the_parent(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    held = leases.hold(["a"])
    with held:
        forked(lambda: held.__exit__(None, None, None))
        assert [path.suffix for path in tmp_path.iterdir()] == [".lease"]
        assert Leases(tmp_path).held() == {"a"}
    assert list(tmp_path.iterdir()) == []


def test_what_was_counted_is_saved_once(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    put(store, 1)
    found_in(store, 1)
    found_in(store, 1)
    store.failures.note(OSError("no room"), caches=5)

    def in_child() -> int:
        found_in(store, 1)
        store.close()
        return store._counters.values()["hits"]

    assert forked(in_child) == 1
    store.close()
    again = DiskStore(tmp_path)
    assert used(again) == {key_of(1): 3}
    counts = all_counts(again.catalog)
    assert counts["hits"] == 3
    assert counts["failed_writes"] == 5


def test_a_bad_blob_that_the_parents_thread_is_to_drop(tmp_path: Path) -> None:
    """The child drops it by itself, rather than hold it for bad for ever."""
    store = DiskStore(tmp_path, ram_bytes=0)
    put(store, 1)
    store.files.path(key_of(1)).write_bytes(b"spoilt")
    deleting = Elsewhere(store.directory_lock.exclusive)
    assert store.get(key_of(1), fingerprint=FINGERPRINT, input_ids=[1000, 1001, 1002, 1003, 1004]) == (None, True)

    def in_child() -> Any:
        put(store, 1)  # waits for the lock to drop what it has not found bad itself: nothing
        return found_in(store, 1)

    child = Child(in_child, waits=True)
    deleting.leave()
    store.flush()
    assert child.result() == [True]


@pytest.mark.parametrize("url", ["file", "memory"])
def test_a_remote_tier(url: str, tmp_path: Path) -> None:
    remote = f"file://{tmp_path / 'remote'}" if url == "file" else "memory://caches"
    store = TieredStore(tmp_path / "one", remote=remote, remote_timeout_s=60)
    put(store, 1)
    store.flush()  # its thread has uploaded
    uploads = store.remote.stats().uploads

    def in_child() -> Any:
        put(store, 2)
        store.flush()
        other = TieredStore(tmp_path / "two", remote=remote, remote_timeout_s=60)
        return [uploads, store.remote.stats().uploads, found_in(other, 1, 2), found_in(other, 1)]

    assert forked(in_child) == [1, 1, [True, True], [True]]
    elsewhere = TieredStore(tmp_path / "three", remote=remote, remote_timeout_s=60)
    assert found_in(elsewhere, 1) == [True]  # its threads read

    def read_in_child() -> Any:
        elsewhere.drop_from_memory([key_of(1)])
        elsewhere.files.remove([key_of(1)])
        return found_in(elsewhere, 1)

    assert forked(read_in_child) == [True]
    put(store, 3)
    store.flush()
    assert store.remote.stats().uploads == 2
    store.close()
