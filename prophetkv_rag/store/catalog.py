"""The list of stored chunk caches and of who refers to them: one SQLite file that several processes may share."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prophetkv_rag.errors import StoreError
from prophetkv_rag.store.base import TextEntry

SCHEMA_VERSION = 1
"""Bumped whenever the tables change; kept in the file as SQLite's `user_version`."""

_SCHEMA = (
    """CREATE TABLE chunks (
        id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, fingerprint TEXT NOT NULL,
        anchor INTEGER, length INTEGER, digest TEXT, num_tokens INTEGER NOT NULL, nbytes INTEGER NOT NULL)""",
    "CREATE INDEX chunks_by_fingerprint ON chunks (fingerprint, id)",
    "CREATE TABLE refs (owner TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (owner, key)) WITHOUT ROWID",
    "CREATE INDEX refs_by_key ON refs (key)",
)
_BUSY_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class CatalogRow:
    """One chunk as the catalog knows it; `nbytes` is its blob's size, or 0 if the blob was lost."""

    key: str
    fingerprint: str
    num_tokens: int
    nbytes: int


class Catalog:
    """Every method is one transaction, and safe to call from several threads and processes.

    A row whose blob was lost stays, with `nbytes` 0: its text is still recognised in prompts, so the first query that
    needs the chunk computes and stores it again.

    Args:
        path: The SQLite file; made if it is not there.

    Raises:
        StoreError: If the file cannot be used, is no catalog, or was made by a newer version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite's -wal and -shm files take over the mode
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise self._error(error) from error
        try:
            self._open()
        except BaseException:
            self._connection.close()
            raise

    def upsert(self, row: CatalogRow, entry: TextEntry | None) -> None:
        """Add a chunk, or renew it; without `entry` a known text entry stays."""
        text = (None, None, None) if entry is None else (entry.anchor, entry.length, entry.digest)
        with self._transaction() as run:
            run.execute(
                """INSERT INTO chunks (key, fingerprint, num_tokens, nbytes, anchor, length, digest)
                VALUES (?, ?, ?, ?, ?, ?, ?)
                ON CONFLICT (key) DO UPDATE SET fingerprint = excluded.fingerprint, num_tokens = excluded.num_tokens,
                nbytes = excluded.nbytes, anchor = coalesce(excluded.anchor, anchor),
                length = coalesce(excluded.length, length), digest = coalesce(excluded.digest, digest)""",
                (row.key, row.fingerprint, row.num_tokens, row.nbytes, *text),
            )

    def mark_lost(self, key: str) -> None:
        """Note that the blob of `key` is gone."""
        with self._transaction() as run:
            run.execute("UPDATE chunks SET nbytes = 0 WHERE key = ?", (key,))

    def __contains__(self, key: str) -> bool:
        with self._transaction(is_write=False) as run:
            return run.execute("SELECT 1 FROM chunks WHERE key = ?", (key,)).fetchone() is not None

    def delete(self, keys: Iterable[str]) -> None:
        """Drop chunks and all references to them."""
        with self._transaction() as run:
            for key in keys:
                run.execute("DELETE FROM chunks WHERE key = ?", (key,))
                run.execute("DELETE FROM refs WHERE key = ?", (key,))

    def add_references(self, owner: str, keys: Iterable[str]) -> None:
        """Note that `owner` refers to these keys."""
        with self._transaction() as run:
            run.executemany("INSERT OR IGNORE INTO refs (owner, key) VALUES (?, ?)", [(owner, key) for key in keys])

    def drop_references(self, owner: str, keys: Iterable[str]) -> list[str]:
        """Drop `owner`'s references, and the chunks that nobody refers to any more; returns the keys of those."""
        unreferenced = []
        with self._transaction() as run:
            for key in keys:
                is_dropped = run.execute("DELETE FROM refs WHERE owner = ? AND key = ?", (owner, key)).rowcount
                if is_dropped and run.execute("SELECT 1 FROM refs WHERE key = ?", (key,)).fetchone() is None:
                    run.execute("DELETE FROM chunks WHERE key = ?", (key,))
                    unreferenced.append(key)
        return unreferenced

    def has_references(self, key: str) -> bool:
        """Whether anybody refers to this key."""
        with self._transaction(is_write=False) as run:
            return run.execute("SELECT 1 FROM refs WHERE key = ?", (key,)).fetchone() is not None

    def references(self, owner: str) -> list[str]:
        """Keys that `owner` refers to."""
        with self._transaction(is_write=False) as run:
            return [key for (key,) in run.execute("SELECT key FROM refs WHERE owner = ?", (owner,))]

    def entries(self, fingerprint: str, *, after_id: int = 0) -> list[tuple[int, str, TextEntry]]:
        """(id, key, entry) of the chunks of one identity that have an entry and a larger id, in order of ids."""
        with self._transaction(is_write=False) as run:
            rows = run.execute(
                """SELECT id, key, anchor, length, digest FROM chunks
                WHERE fingerprint = ? AND id > ? AND digest IS NOT NULL ORDER BY id""",
                (fingerprint, after_id),
            )
            return [(row_id, key, TextEntry(*entry)) for row_id, key, *entry in rows]

    def rows(self) -> list[CatalogRow]:
        """All chunks."""
        with self._transaction(is_write=False) as run:
            return [CatalogRow(*row) for row in run.execute("SELECT key, fingerprint, num_tokens, nbytes FROM chunks")]

    def totals(self) -> tuple[int, int, int]:
        """Chunks, tokens and bytes whose blobs are there."""
        with self._transaction(is_write=False) as run:
            chunks, tokens, nbytes = run.execute(
                "SELECT count(*), coalesce(sum(num_tokens), 0), coalesce(sum(nbytes), 0) FROM chunks WHERE nbytes > 0"
            ).fetchone()
            return chunks, tokens, nbytes

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _open(self) -> None:
        try:
            if self._connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error as error:
            raise self._error(error) from error
        with self._transaction() as run:
            version = run.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                msg = (
                    f"{self._path} was made by a newer version of prophetkv_rag (its schema version is {version}, this "
                    f"one knows {SCHEMA_VERSION}): upgrade prophetkv_rag, or use another directory"
                )
                raise StoreError(msg)
            if version == 0:
                for statement in _SCHEMA:
                    run.execute(statement)
                run.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self, *, is_write: bool = True) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE" if is_write else "BEGIN")
                with self._connection:  # commits, or rolls back on an exception
                    yield self._connection
            except sqlite3.Error as error:
                raise self._error(error) from error

    def _error(self, error: Exception) -> StoreError:
        return StoreError(f"cannot use the catalog {self._path}: {error}")
