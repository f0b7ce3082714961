"""What is free, against what the system itself says, and what is chosen from it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from prophetkv_rag.store.disk import DiskStore, default_disk_bytes, free_disk, free_memory, room
from tests.store.caches import FINGERPRINT, key_of, make_cache


def test_free_disk_is_that_of_the_nearest_directory(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    expected = status.f_bavail * status.f_frsize
    found = free_disk(tmp_path / "not" / "made" / "yet")
    assert abs(found - expected) < 1 << 30
    assert not (tmp_path / "not").exists()


def test_free_memory_is_what_others_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CGROUPS", ())
    found = free_memory()
    assert found is not None
    assert abs(found - psutil.virtual_memory().available) < 1 << 30


def test_a_containers_limit_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CGROUPS", ((str(tmp_path), "memory.max", "memory.current", "inactive_file"),))
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\ninactive_file 600\nactive_file 400\n")
    assert free_memory() == 2600
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() != 2600


def test_nothing_that_tells_means_a_fixed_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: None)
    store = DiskStore(tmp_path)
    assert store.stats().ram_max_nbytes == 1 << 30
    store.close()


def test_the_ram_tier_takes_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nbytes = make_cache(1).nbytes
    monkeypatch.setattr(room, "free_memory", lambda: 4 * nbytes)
    store = DiskStore(tmp_path)
    for seed in (1, 2):
        store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)
    assert (store.stats().ram_max_nbytes, store.stats().ram_nbytes) == (nbytes, nbytes)
    store.close()
    asked = DiskStore(tmp_path, 10 * nbytes)
    assert asked.stats().ram_max_nbytes == 10 * nbytes
    asked.close()


def test_the_disk_limit_never_evicts_what_is_there(tmp_path: Path) -> None:
    free = free_disk(tmp_path)
    assert abs(default_disk_bytes(tmp_path, held=7 << 40) - (7 << 40) - free // 2) < 1 << 30
