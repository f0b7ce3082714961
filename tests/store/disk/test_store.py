"""What only a store on disk does: survive, notice damage, repair, and keep others out."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag.errors import BlobError, StoreError
from prophetkv_rag.prompt.chunk_index import text_entry
from prophetkv_rag.store import files
from prophetkv_rag.store.chunk_cache import ChunkCache
from prophetkv_rag.store.disk.store import DiskStore
from tests.store.caches import FINGERPRINT, assert_same, ids_of, key_of, make_cache

ENTRY = text_entry("the text of some chunk")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    """Three chunks that are on disk only."""
    opened = DiskStore(tmp_path / "store", ram_bytes=0)
    put(opened, 1, 2, 3)
    yield opened
    opened.close()


def put(store: DiskStore, *seeds: int) -> None:
    for seed in seeds:
        store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT, entry=ENTRY)


def get(store: DiskStore, seed: int) -> tuple[ChunkCache | None, bool]:
    return store.get(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed))


def blob(store: DiskStore, seed: int) -> Path:
    return store.directory / "blobs" / key_of(seed)[:2] / f"{key_of(seed)}.safetensors"


def flip_a_bit(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


def test_everything_is_there_after_reopening(store: DiskStore) -> None:
    store.add_references("a", [key_of(1)])
    store.close()
    again = DiskStore(store.directory)
    assert_same(get(again, 1)[0], make_cache(1))
    assert sorted(key for key, _ in again.entries(FINGERPRINT)) == sorted(map(key_of, (1, 2, 3)))
    assert {entry for _, entry in again.entries(FINGERPRINT)} == {ENTRY}
    assert again.references("a") == [key_of(1)]
    assert again.stats().nbytes == sum(blob(again, seed).stat().st_size for seed in (1, 2, 3))
    assert again.stats().location == str(store.directory)
    again.close()


def test_the_ram_tier_answers_without_the_disk(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, ram_bytes=2 * make_cache(1).nbytes)
    put(store, 1, 2, 3)
    for seed in (1, 2, 3):
        blob(store, seed).unlink()
    assert [get(store, seed)[0] is not None for seed in (1, 2, 3)] == [False, True, True]
    assert store._ram.get(key_of(3), fingerprint="0" * 64, input_ids=ids_of(3)) is None
    assert store._ram.get(key_of(3), fingerprint=FINGERPRINT, input_ids=ids_of(2)) is None
    store.delete([key_of(3)])
    assert get(store, 3) == (None, False)


def test_a_missing_blob_is_a_miss_and_is_written_again(store: DiskStore) -> None:
    blob(store, 1).unlink()
    assert key_of(1) not in store
    assert get(store, 1) == (None, False)
    put(store, 1)
    assert_same(get(store, 1)[0], make_cache(1))


def test_a_bad_blob_is_reported_once_and_removed_and_written_again(
    store: DiskStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.add_references("a", [key_of(1)])
    size = blob(store, 1).stat().st_size
    for damage in (
        lambda path: flip_a_bit(path),
        lambda path: os.truncate(path, size - 1),
        lambda path: os.truncate(path, 0),
    ):
        caplog.clear()
        damage(blob(store, 1))
        with caplog.at_level(logging.WARNING):
            assert get(store, 1) == (None, True)
            assert get(store, 1) == (None, False)
        store.flush()  # a thread removes it, so that no query waits for whoever has the directory locked
        assert not blob(store, 1).exists()
        assert key_of(1) not in store
        assert store.stats().chunks == 2
        put(store, 1)
        assert_same(get(store, 1)[0], make_cache(1))
    assert store.stats().corrupt == 3
    assert store.references("a") == [key_of(1)]


def test_a_bad_blob_that_was_replaced_meanwhile_is_not_removed(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two readers find one bad blob; the first has computed it again before the second comes to delete it."""
    flip_a_bit(blob(store, 1))
    other = DiskStore(store.directory, ram_bytes=0)
    decode, pending = store.files.read, [1]

    def decode_late(*args: Any, **kwargs: Any) -> Any:
        try:
            return decode(*args, **kwargs)
        except BlobError:
            if pending:
                pending.pop()
                assert get(other, 1) == (None, True)
                put(other, 1)
            raise

    monkeypatch.setattr(store.files, "read", decode_late)
    with caplog.at_level(logging.WARNING):
        assert_same(get(store, 1)[0], make_cache(1))
    assert blob(store, 1).exists()
    assert key_of(1) in store
    assert (store.stats().corrupt, other.stats().corrupt) == (0, 1)
    other.close()


def test_a_relative_directory_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = DiskStore("caches", ram_bytes=0)
    put(store, 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    put(store, 2)
    assert_same(get(store, 1)[0], make_cache(1))
    assert store.directory == tmp_path / "caches"
    assert list((tmp_path / "elsewhere").iterdir()) == []
    store.close()


def test_damage_is_logged_once_per_chunk(store: DiskStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            flip_a_bit(blob(store, 1))
            assert get(store, 1) == (None, True)
            put(store, 1)
    assert len(caplog.records) == 1
    assert "checksum" in caplog.text


def test_a_blob_under_another_chunks_name_is_not_served(store: DiskStore) -> None:
    blob(store, 2).replace(blob(store, 1))
    assert get(store, 1) == (None, True)


def test_a_directory_where_a_blob_should_be_raises_nothing(store: DiskStore) -> None:
    blob(store, 1).unlink()
    blob(store, 1).mkdir()
    assert get(store, 1) == (None, True)


def test_verify_finds_everything_and_repair_mends_it(store: DiskStore) -> None:
    flip_a_bit(blob(store, 1))
    blob(store, 2).unlink()
    orphan = blob(store, 7)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(blob(store, 3).read_bytes())
    left_over = blob(store, 3).with_suffix(".safetensors.00ff.tmp")
    left_over.write_bytes(b"half")

    for repair in (False, False, True):
        report = store.verify(repair=repair)
        assert report.checked == 3
        assert report.bad == (key_of(1),)
        assert report.missing == (key_of(2),)
        assert sorted(report.orphans) == sorted([key_of(7), left_over.name])
        assert report.repaired == repair
    report = store.verify()
    assert (report.bad, report.missing, report.orphans) == ((), (), ())
    assert not orphan.exists()
    assert not left_over.exists()
    assert store.stats().chunks == 1
    assert_same(get(store, 3)[0], make_cache(3))
    # The lost chunks' texts are still known, so that the first prompt that has them brings the caches back.
    assert sorted(key for key, _ in store.entries(FINGERPRINT)) == sorted(map(key_of, (1, 2, 3)))
    assert get(store, 1) == (None, False)
    put(store, 1)
    assert store.verify().checked == 3
    assert store.stats().chunks == 2


def test_repair_while_others_write_loses_nothing(store: DiskStore) -> None:
    """A blob that is written but not in the catalog yet looks like an orphan; repair must wait for its writer."""
    other = DiskStore(store.directory, ram_bytes=0)
    writer = threading.Thread(target=lambda: put(other, *range(10, 60)))
    writer.start()
    while writer.is_alive():
        report = store.verify(repair=True)
        assert (report.bad, report.missing, report.orphans) == ((), (), ())
    writer.join()
    for seed in range(10, 60):
        assert_same(get(store, seed)[0], make_cache(seed))
    other.close()


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = DiskStore(tmp_path / "deep" / "store")
        put(store, 1)
    finally:
        os.umask(before)
    for path in [store.directory, *store.directory.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert {"catalog.sqlite", "catalog.sqlite-wal", "lock", "blobs"} <= {
        path.name for path in store.directory.iterdir()
    }
    store.close()


def test_a_blob_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut leaves cannot be tried here; the order of the calls that rule it out can."""
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        calls.append("sync directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def record_replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    files.write_file(tmp_path / "ab" / "blob", b"data")
    assert calls == ["sync directory", "sync file", "rename", "sync directory"]


def test_a_write_that_fails_leaves_nothing_and_says_so(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        put(store, 4)
    monkeypatch.undo()
    assert key_of(4) not in store
    assert store.verify().orphans == ()


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write anywhere, so the tests of read-only directories are another user's."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot use"):
        DiskStore(tmp_path / "file")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        DiskStore(directory / "made before").close()
        directory.chmod(0o555)
        for path in (directory / "made before").rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        (directory / "made before").chmod(0o555)
        with unprivileged():
            for target in (directory / "new", directory / "made before"):
                with pytest.raises(StoreError, match=r"cannot use .*; give a directory that can be written to"):
                    DiskStore(target)
        directory.chmod(0o755)
        (directory / "made before").chmod(0o755)
        (directory / "made before" / "blobs").chmod(0o755)


def test_a_newer_or_foreign_catalog_is_a_clear_error(store: DiskStore) -> None:
    store.close()
    catalog = store.directory / "catalog.sqlite"
    connection = sqlite3.connect(catalog)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match="newer version of prophetkv_rag"):
        DiskStore(store.directory)
    catalog.write_bytes(b"this is no database, but it is long enough to be looked at" * 20)


def test_a_closed_store_says_that_it_is_closed(store: DiskStore) -> None:
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.stats()
