"""The catalog on a Python whose SQLite is old."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from prophetkv_rag.errors import StoreError
from prophetkv_rag.store.catalog.schema import OLDEST_SQLITE
from prophetkv_rag.store.disk import DiskStore


def test_one_that_is_too_old_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 22, 0))
    monkeypatch.setattr(sqlite3, "sqlite_version", "3.22.0")
    with pytest.raises(StoreError, match=r"SQLite is 3\.22\.0, and 3\.24\.0 or later is needed"):
        DiskStore(tmp_path / "caches")
    assert not (tmp_path / "caches" / "catalog.sqlite").exists()


def test_the_oldest_that_is_said_to_do_is_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", OLDEST_SQLITE)
    DiskStore(tmp_path / "caches").close()
