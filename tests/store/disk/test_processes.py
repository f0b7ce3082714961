"""Several processes on one directory, and processes that are killed in the middle of writing."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prophetkv_rag.prompt.chunk_index import text_entry
from prophetkv_rag.store.disk.store import DiskStore
from tests.store.caches import FINGERPRINT, assert_same, ids_of, key_of, make_cache

ROOT = Path(__file__).parents[3]
SIZE = {"num_layers": 8, "head_dim": 64}
NUM_TOKENS = 128  # a blob of about a megabyte and a half, so that a kill meets a half-written one

WRITER = """
import sys
from prophetkv_rag.prompt.chunk_index import text_entry
from prophetkv_rag.store.disk.store import DiskStore
from tests.store.caches import FINGERPRINT, key_of, make_cache

store = DiskStore(sys.argv[1], ram_bytes=0)
print("ready", flush=True)
sys.stdin.readline()
for seed in range(int(sys.argv[2]), int(sys.argv[3])):
    key = key_of(seed, 128)
    cache = make_cache(seed, 128, num_layers=8, head_dim=64)
    store.put(key, cache, fingerprint=FINGERPRINT, entry=text_entry(f"the text of chunk number {seed}"))
    store.add_references("writer", [key])
    print(key, flush=True)
"""


def start_writer(directory: Path, first: int, stop: int) -> subprocess.Popen[str]:
    """Start a process that puts chunks `first` to `stop`, one by one; it waits until `go` is called."""
    command = [sys.executable, "-c", WRITER, str(directory), str(first), str(stop)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def assert_all_served(store: DiskStore, seeds: range) -> None:
    for seed in seeds:
        cache, was_corrupt = store.get(
            key_of(seed, NUM_TOKENS), fingerprint=FINGERPRINT, input_ids=ids_of(seed, NUM_TOKENS)
        )
        assert not was_corrupt
        assert_same(cache, make_cache(seed, NUM_TOKENS, **SIZE))


def test_what_another_process_stores_is_found_and_announced_once(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.put(key_of(1), make_cache(1), fingerprint=FINGERPRINT, entry=text_entry("the text of chunk number one"))
    assert [key for key, _ in store.entries(FINGERPRINT)] == [key_of(1)]
    assert list(store.new_entries(FINGERPRINT)) == []
    for first, stop in ((10, 13), (13, 14)):
        writer = start_writer(tmp_path, first, stop)
        go(writer)
        assert writer.wait() == 0
        expected = [
            (key_of(seed, NUM_TOKENS), text_entry(f"the text of chunk number {seed}")) for seed in range(first, stop)
        ]
        assert list(store.new_entries(FINGERPRINT)) == expected
        assert list(store.new_entries(FINGERPRINT)) == []
        assert list(store.new_entries("0" * 64)) == []
        assert_all_served(store, range(first, stop))
    assert len(store.references("writer")) == 4
    store.delete([key_of(13, NUM_TOKENS)])
    assert store.stats().chunks == 4
    store.close()


def test_processes_may_write_the_same_chunks_at_the_same_time(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, first, 24) for first in (0, 0, 8)]
    for writer in writers:
        go(writer)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    store = DiskStore(tmp_path, ram_bytes=0)
    report = store.verify()
    assert report.checked == 24
    assert (report.bad, report.missing, report.orphans) == ((), (), ())
    assert_all_served(store, range(24))
    store.close()


@pytest.mark.parametrize("trial", range(6))
def test_killed_in_the_middle_of_writing(tmp_path: Path, trial: int) -> None:
    """Nothing wrong is ever served, what was reported as stored is stored, and the next process goes on."""
    generator = random.Random(trial)
    reported: set[str] = set()
    for _ in range(2):  # the second process meets what the first has left, at the same keys
        writer = start_writer(tmp_path, 0, 400)
        go(writer)
        assert writer.stdout is not None
        reported.add(writer.stdout.readline().strip())
        time.sleep(generator.uniform(0.0, 0.15))
        writer.send_signal(signal.SIGKILL)
        reported.update(line.strip() for line in writer.stdout if line.endswith("\n"))
        assert writer.wait() == -signal.SIGKILL

        store = DiskStore(tmp_path, ram_bytes=0)
        report = store.verify()
        assert report.bad == ()
        assert report.missing == ()
        assert len(report.orphans) <= 2  # what each process was writing when it was killed
        assert {key for key, _ in store.entries(FINGERPRINT)} >= reported
        assert_all_served(store, range(len(reported)))
        store.close()
    store = DiskStore(tmp_path, ram_bytes=0)
    store.verify(repair=True)
    report = store.verify()
    assert (report.bad, report.missing, report.orphans) == ((), (), ())
    assert_all_served(store, range(len(reported)))
    store.close()
