"""What a disk, a clock or a hand may do to a store while it is in use: the answers stay those of a clean run."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromadb
import pytest
import torch

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine, StoreError
from prophetkv_rag.chroma import KVCachingCollection
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.upkeep import gc
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[3]
MODEL = tiny_llama()
TEXTS = [text_of(20, seed=seed) for seed in range(4)]
PROMPT = "Read: " + " ".join(TEXTS) + " So?"


def engine_on(store: DiskStore | None) -> ProphetKVEngine:
    return ProphetKVEngine(MODEL, tiny_tokenizer(), config=ProphetKVConfig(recompute_ratio=0.0), store=store)


CLEAN = engine_on(None)
KEYS = CLEAN.add_chunks(TEXTS)
WANTED = CLEAN.prefill(PROMPT).logits


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write anywhere; the process is another user's while this lasts."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def assert_same_answer(engine: ProphetKVEngine) -> list[str]:
    result = engine.prefill(PROMPT)
    engine.store.flush()
    assert len(result.report.chunks) == len(TEXTS)
    torch.testing.assert_close(result.logits, WANTED, atol=1e-4, rtol=1e-4)
    return [chunk.status for chunk in result.report.chunks]


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "truncated": lambda blob, other: blob.write_bytes(blob.read_bytes()[:-100]),
    "flipped": lambda blob, other: blob.write_bytes(bytes([*blob.read_bytes()[:-1], blob.read_bytes()[-1] ^ 1])),
    "swapped": lambda blob, other: blob.write_bytes(other.read_bytes()),
    "empty": lambda blob, other: blob.write_bytes(b""),
    "gone": lambda blob, other: blob.unlink(),
    "a directory": lambda blob, other: (blob.unlink(), blob.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_blobs_change_no_answer_and_are_made_good(tmp_path: Path, damage: str) -> None:
    engine = engine_on(DiskStore(tmp_path, 0))
    engine.add_chunks(TEXTS)
    store = engine.store
    assert isinstance(store, DiskStore)
    DAMAGES[damage](store.files.path(KEYS[0]), store.files.path(KEYS[1]))
    expected = "miss" if damage == "gone" else "corrupt"
    assert assert_same_answer(engine) == [expected, "hit", "hit", "hit"]
    if damage != "a directory":
        assert assert_same_answer(engine) == ["hit"] * 4
        assert store.verify().num_faults == 0
    store.close()


def test_a_directory_that_vanishes_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_on(DiskStore(tmp_path / "store", 0))
    engine.add_chunks(TEXTS)
    shutil.rmtree(tmp_path / "store")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert assert_same_answer(engine) == ["miss"] * 4
    assert len(caplog.records) == 1, caplog.text
    assert "cannot be stored" in caplog.text


DISK_FULL = """
import logging, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path.append({root!r})
from tests.store.disk.test_faults import *
records = []
class Keep(logging.Handler):
    def emit(self, record): records.append(record.getMessage())
logging.getLogger("prophetkv_rag").addHandler(Keep())
store = DiskStore({directory!r}, 0, policy="on_first_use")
engine = engine_on(store)
engine.add_chunks(TEXTS)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for _ in range(3):
    assert assert_same_answer(engine) == ["miss"] * 4
assert len(records) == 1, records
assert store.stats().failed_writes == 12
second = engine_on(store)
second.chunk_index.remove(KEYS[0])
store.policy = "eager"
assert second.add_chunks(TEXTS) == KEYS  # indexing meets the same disk
assert assert_same_answer(second) == ["miss"] * 4
assert len(records) == 1, records
assert store.stats().failed_writes == 20
store.close()
print("same answers, one warning:", records[0][:60])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_a_full_disk_costs_one_warning_and_no_answer(tmp_path: Path) -> None:
    code = DISK_FULL.format(root=str(ROOT), directory=str(tmp_path / "store"))
    result = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.startswith("same answers, one warning: chunk caches cannot be stored")
    store = DiskStore(tmp_path / "store", 0)
    assert store.verify().num_faults == 0
    assert list((tmp_path / "store" / "incoming").iterdir()) == []
    assert assert_same_answer(engine_on(store)) == ["miss"] * 4
    assert assert_same_answer(engine_on(store)) == ["hit"] * 4
    store.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no such permissions")
def test_a_directory_that_becomes_read_only_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as name, caplog.at_level(logging.WARNING):
        directory = Path(name) / "store"
        store = DiskStore(directory, 0)
        engine = engine_on(store)
        engine.add_chunks(TEXTS[:2], owner="a")
        folders = [path for path in (Path(name), directory, *directory.rglob("*")) if path.is_dir()]
        for path in [*folders, *directory.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        with unprivileged():
            assert engine.add_chunks(TEXTS, owner="a") == KEYS
            assert assert_same_answer(engine) == ["hit", "hit", "miss", "miss"]
            assert assert_same_answer(engine) == ["hit", "hit", "miss", "miss"]
            assert store.stats().failed_writes >= 2
            with pytest.raises((StoreError, OSError)):
                engine.remove_chunks(KEYS[:1], owner="a")  # what is said to be deleted is deleted
        assert len(caplog.records) == 1, caplog.text
        for path in folders:
            path.chmod(0o755)
        for path in directory.rglob("*"):
            path.chmod(0o755)
        engine.add_chunks(TEXTS, owner="a")
        assert assert_same_answer(engine) == ["hit"] * 4
        assert store.verify().num_faults == 0
        assert set(store.references("a")) == set(KEYS)
        store.close()


@pytest.mark.parametrize(
    "jump",
    [-10 * 365 * 86400.0, 10 * 365 * 86400.0, -5 * 3600.0, 5 * 3600.0],
    ids=["back", "forward", "hours back", "hours forward"],
)
def test_a_clock_that_jumps_loses_nothing_and_stops_no_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    store = DiskStore(tmp_path, 0, max_bytes=10**6)
    engine = engine_on(store)
    engine.add_chunks(TEXTS[:3], owner="a")
    nobody = engine.add_chunks(TEXTS[3:], owner="b")
    real, offset = time.time, jump
    monkeypatch.setattr(time, "time", lambda: real() + offset)
    assert assert_same_answer(engine) == ["hit"] * 4
    live = {"a": set(KEYS[:3])}
    gc(store, live)  # by a clock put back everything is new; by one put forward it is old
    offset = jump + 7200.0
    gc(store, live)
    assert nobody[0] not in store, "it is collected a grace age later at the latest"
    assert all(key in store for key in KEYS[:3])
    store.close()


def test_gc_spares_what_is_being_indexed(tmp_path: Path) -> None:
    """References are written before the record is: a collection that runs in between must not take them."""
    store = DiskStore(tmp_path, 0)
    engine = engine_on(store)
    engine.add_chunks(TEXTS, owner="a")
    assert gc(store, {"a": set()}).stale_references == 0
    assert all(key in store for key in KEYS)
    report = gc(store, {"a": set(KEYS[:1])}, grace_s=-1)
    assert (report.stale_references, report.unreferenced) == (3, 3)
    assert [key in store for key in KEYS] == [True, False, False, False]
    assert gc(store, {}, grace_s=-1).unreferenced == 1, "a collection that is gone refers to nothing"
    store.close()


@pytest.mark.parametrize("policy", ["eager", "on_first_use"])
def test_a_clock_put_forward_while_indexing_takes_nothing_from_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Any
) -> None:
    """`gc` sees references hours old, by its clock, whose records are just being written: by another process, say."""
    writer, collector = DiskStore(tmp_path, 0, policy=policy), DiskStore(tmp_path, 0)
    engine = engine_on(writer)
    client = chromadb.EphemeralClient()
    plain = client.get_or_create_collection(f"jump-{tmp_path.name[:40]}-{policy}", embedding_function=None)
    collection = KVCachingCollection(plain, engine)
    collection.add(ids=["0"], documents=TEXTS[:1], embeddings=[[1.0, 0.0]])
    real, reports = time.time, []

    def add(**columns: Any) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + 5 * 3600)
        reports.append(gc(collector, lambda: {str(plain.id): {KEYS[0]}}))  # before the record is there ...
        type(plain).add(plain, **columns)
        reports.append(gc(collector, lambda: {str(plain.id): {KEYS[0]}}))  # ... and read just before it was

    monkeypatch.setattr(plain, "add", add, raising=False)
    collection.add(ids=["1", "2"], documents=TEXTS[1:3], embeddings=[[1.0, 0.0], [0.0, 1.0]])
    assert [report.stale_references + report.unreferenced for report in reports] == [0, 0]
    assert set(writer.references(collection.owner)) == set(KEYS[:3])
    assert all(writer.knows(key) for key in KEYS[:3])
    late = gc(collector, lambda: {str(plain.id): set(KEYS[:2])})
    assert (late.stale_references, late.unreferenced) == (1, 1), "nobody is writing any more"
    writer.close()
    collector.close()


def test_gc_leaves_alone_what_belongs_to_no_collection(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 0)
    engine = engine_on(store)
    for text, owner in zip(TEXTS, ("http:default", "engine", "a", "b"), strict=True):
        engine.add_chunks([text], owner=owner)
    assert gc(store, {"a": {KEYS[2]}}, grace_s=-1).unreferenced == 1
    assert [key in store for key in KEYS] == [True, True, True, False]
    store.close()


def test_gc_gives_records_back_the_references_that_a_full_disk_lost(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 0)
    engine_on(store).add_chunks(TEXTS, owner="a")
    with store.catalog.transaction() as run:
        run.execute("DELETE FROM refs WHERE key != ?", (KEYS[0],))
    assert gc(store, {"a": set(KEYS[:3])}, grace_s=-1).unreferenced == 1
    assert set(store.references("a")) == set(KEYS[:3])
    store.close()


def test_a_hundred_thousand_entries_open_at_once(tmp_path: Path) -> None:
    """No time is asserted here (docs/store.md has it); that opening reads no blobs and few rows is."""
    store = DiskStore(tmp_path, 0)
    with store.catalog.transaction() as run:
        run.executemany(
            "INSERT INTO chunks (key, fingerprint, num_tokens, nbytes, anchor, length, digest) VALUES (?,?,?,?,?,?,?)",
            ((f"{n:064x}", "f" * 64, 256, 1000, n, 40, f"{n:064x}") for n in range(100_000)),
        )
    assert store.catalog.nbytes() == 100_000_000
    store.close()
    store = DiskStore(tmp_path, 0, max_bytes=200_000_000)
    assert store.catalog.nbytes() == 100_000_000
    assert store.accepts_new()
    assert sum(1 for _ in store.entries("f" * 64)) == 100_000
    store.close()
