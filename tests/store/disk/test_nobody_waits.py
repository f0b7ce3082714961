"""No query waits for the store: whoever holds its locks, and however slow the remote tier is."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag import ProphetKVEngine
from prophetkv_rag.store import DirectoryLock
from prophetkv_rag.store.disk.leases import Leases
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.tiered import TieredStore
from prophetkv_rag.store.remote import fetches as fetches_module
from prophetkv_rag.store.remote.fetches import Fetch, Fetches, Found
from tests.store.caches import FINGERPRINT, assert_same, ids_of, key_of, make_cache
from tests.store.faulty_files import FaultyFileSystem, hanging
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

TEXTS = [text_of(20, seed=seed) for seed in range(3)]
PROMPT = "Read: " + " ".join(TEXTS) + " So?"


@contextmanager
def held_by_another_process(directory: Path) -> Iterator[None]:
    """Somebody collects, clears or repairs for as long as this lasts."""
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(directory / "lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield
    finally:
        process.communicate("")


def done(call: Callable[[], Any]) -> Any:
    """What a call returns, which must come back though the lock is held: it would wait for ever."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(120)
    assert results, "it waits"
    return results[0]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
@pytest.mark.parametrize("what", ["bad", "of another format"])
def test_a_query_that_meets_a_blob_to_drop_leaves_that_to_others(tmp_path: Path, what: str) -> None:
    maker = ProphetKVEngine(
        tiny_llama(),
        tiny_tokenizer(),
        store=DiskStore(tmp_path, 0, blob_format="int8" if "format" in what else "exact"),
    )
    keys = maker.add_chunks(TEXTS)
    store = DiskStore(tmp_path, 0)
    engine = ProphetKVEngine(maker.model, maker.tokenizer, store=store)
    if what == "bad":
        for key in keys:
            store.files.path(key).write_bytes(b"nonsense")
    expected = "corrupt" if what == "bad" else "miss"
    with held_by_another_process(tmp_path):
        statuses = done(lambda: [chunk.status for chunk in engine.prefill(PROMPT).report.chunks])
        assert statuses == [expected] * 3
        assert [key in store for key in keys] == [False] * 3, "whoever indexes now computes them"
        chunks = done(lambda: engine.prefill(PROMPT).report.chunks)
        assert [chunk.status for chunk in chunks] == ["hit"] * 3, "what was computed waits in memory"
    store.flush()
    assert [key in store for key in keys] == [True] * 3, "and has taken the bad ones' place"
    assert store.verify().num_faults == 0
    assert {chunk.tier for chunk in engine.prefill(PROMPT).report.chunks} == {"disk"}
    store.close()
    maker.store.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_query_does_not_wait_for_a_delete_that_waits(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 0)
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), store=store)
    keys = engine.add_chunks(TEXTS)
    with held_by_another_process(tmp_path):
        deleting = threading.Thread(target=lambda: engine.remove_chunks(keys[:1]))
        deleting.start()
        while not engine.library._owners_lock.locked():
            time.sleep(0.01)
        chunks = done(lambda: engine.prefill(PROMPT).report.chunks)
        assert [chunk.status for chunk in chunks] == ["hit"] * 3
    deleting.join()
    assert len(engine.prefill(PROMPT).report.chunks) == 2
    store.close()


def test_a_put_after_a_bad_blob_was_found_stores_the_good_one(tmp_path: Path) -> None:
    """The thread that drops the bad one may come before, or after: what `put` has stored is there."""
    store = DiskStore(tmp_path, 0)
    for seed in range(20):
        store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)
        store.files.path(key_of(seed)).write_bytes(b"nonsense")
        assert store.get(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed)) == (None, True)
        store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)
    store.flush()
    for seed in range(20):
        assert_same(store.get(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed))[0], make_cache(seed))
    store.close()


def test_a_prompt_gives_the_remote_one_time_out_however_many_chunks_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that had to wait for room among the reads under way get what is left of it, and then nothing is begun."""
    FaultyFileSystem.clear()
    monkeypatch.setattr(fetches_module, "MAX_IN_FLIGHT", 4)
    store = TieredStore(tmp_path, 0, remote="faulty://bucket/caches", remote_timeout_s=30.0)
    now = [1000.0]

    class Clock:
        monotonic = staticmethod(lambda: now[0])
        sleep = staticmethod(time.sleep)

    def find(key: str, seed: int) -> None:
        assert store.find(key, fingerprint=FINGERPRINT, input_ids=ids_of(seed)).cache is None

    with hanging():
        monkeypatch.setattr(fetches_module, "time", Clock)
        keys = [key_of(seed) for seed in range(12)]
        store.expect(keys, fingerprint=FINGERPRINT)
        assert len(store._fetches._in_flight) == 4
        now[0] += 20.0
        store._fetches._in_flight.clear()  # as if these had come: there is room now
        waited: list[Fetch] = []
        monkeypatch.setattr(Fetches, "wait", lambda self, fetch: waited.append(fetch) or Found())
        find(keys[5], 5)
        assert [fetch.begun for fetch in waited] == [1000.0], "it is waited for as long as for all others"
        waited.clear()
        now[0] += 10.0
        asked = FaultyFileSystem.calls.total()
        for seed in range(6, 12):
            find(keys[seed], seed)
        assert waited == []
        assert FaultyFileSystem.calls.total() == asked
        store.expect(keys[:1], fingerprint=FINGERPRINT)
        find(keys[0], 0)
        assert [fetch.begun for fetch in waited] == [1030.0], "the next prompt has its own time"
        monkeypatch.undo()
    store.close()
    FaultyFileSystem.reset()


# ---- leases ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
@pytest.mark.parametrize("before", ["it is locked", "its keys are written"])
def test_a_lease_that_a_sweep_meets_while_it_is_made_still_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    import fcntl
    import os

    mine, others = Leases(tmp_path), Leases(tmp_path)
    target, name = (fcntl, "flock") if before == "it is locked" else (os, "write")
    real, is_first = getattr(target, name), [True]

    def met(*arguments: Any) -> Any:
        if is_first:
            is_first.pop()
            assert others.held() == set(), "nothing is promised yet"
        return real(*arguments)

    monkeypatch.setattr(target, name, met)
    with mine.hold(["a", "b"]):
        assert others.held() == {"a", "b"}
    assert others.held() == set()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_what_a_kill_left_of_a_lease_is_swept_away(tmp_path: Path) -> None:
    for name in ("killed while it was made.making", "killed while it held.lease"):
        (tmp_path / name).write_text("a\nb")
    assert Leases(tmp_path).held() == set()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_the_one_that_is_held(tmp_path: Path) -> None:
    """The helper above locks what the store locks, or it would prove nothing."""
    store = DiskStore(tmp_path, 0)
    with held_by_another_process(tmp_path):
        thread = threading.Thread(target=lambda: store.delete([key_of(1)]), daemon=True)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join()
    with DirectoryLock(tmp_path / "lock").shared():
        pass
    store.close()
