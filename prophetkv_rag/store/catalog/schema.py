"""The catalog's tables, and how a catalog that an older version made becomes one of this version."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from prophetkv_rag.errors import StoreError

OLDEST_SQLITE = (3, 24, 0)
"""The first that knows `ON CONFLICT DO UPDATE`."""

SCHEMA_VERSION = 5
"""Bumped whenever the tables change; kept in the file as SQLite's `user_version`."""

_STEPS: tuple[tuple[str, ...], ...] = (
    # 1: chunks, and who refers to them.
    (
        """CREATE TABLE chunks (
            id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, fingerprint TEXT NOT NULL,
            anchor INTEGER, length INTEGER, digest TEXT, num_tokens INTEGER NOT NULL, nbytes INTEGER NOT NULL)""",
        "CREATE INDEX chunks_by_fingerprint ON chunks (fingerprint, id)",
        "CREATE TABLE refs (owner TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (owner, key)) WITHOUT ROWID",
        "CREATE INDEX refs_by_key ON refs (key)",
    ),
    # 2: how often and how recently a chunk was used (see `ranking`), how much all blobs take, and whose they are.
    (
        "ALTER TABLE chunks ADD COLUMN uses INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE chunks ADD COLUMN last_use INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE chunks ADD COLUMN score REAL NOT NULL DEFAULT 0",
        "ALTER TABLE chunks ADD COLUMN rank REAL NOT NULL DEFAULT 0",
        "ALTER TABLE chunks ADD COLUMN noted_at REAL NOT NULL DEFAULT 0",
        "ALTER TABLE refs ADD COLUMN noted_at REAL NOT NULL DEFAULT 0",
        "CREATE INDEX chunks_by_rank ON chunks (rank, id) WHERE nbytes > 0",
        "CREATE TABLE identities (fingerprint TEXT PRIMARY KEY, model TEXT NOT NULL, namespace TEXT NOT NULL, "
        "seconds_per_token REAL NOT NULL) WITHOUT ROWID",
        "CREATE TABLE state (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID",
        "INSERT INTO state SELECT 'nbytes', coalesce(sum(nbytes), 0) FROM chunks",
        "INSERT INTO state VALUES ('clock', 0)",
        """CREATE TRIGGER chunk_added AFTER INSERT ON chunks WHEN new.nbytes != 0
            BEGIN UPDATE state SET value = value + new.nbytes WHERE name = 'nbytes'; END""",
        """CREATE TRIGGER chunk_resized AFTER UPDATE OF nbytes ON chunks WHEN new.nbytes != old.nbytes
            BEGIN UPDATE state SET value = value + new.nbytes - old.nbytes WHERE name = 'nbytes'; END""",
        """CREATE TRIGGER chunk_deleted AFTER DELETE ON chunks WHEN old.nbytes != 0
            BEGIN UPDATE state SET value = value - old.nbytes WHERE name = 'nbytes'; END""",
    ),
    # 3: remote tiers (by URL), what is known to be there, and what is still to be deleted there: also by a process that
    # was opened without the remote. An empty key stands for everything of a fingerprint.
    (
        "CREATE TABLE remotes (url TEXT PRIMARY KEY, others INTEGER NOT NULL DEFAULT 0, "
        "counted_at REAL NOT NULL DEFAULT 0, hits INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID",
        "CREATE TABLE remote_chunks (key TEXT NOT NULL, url TEXT NOT NULL, nbytes INTEGER NOT NULL, "
        "PRIMARY KEY (key, url)) WITHOUT ROWID",
        "CREATE TABLE remote_deletes (url TEXT NOT NULL, fingerprint TEXT NOT NULL, key TEXT NOT NULL, "
        "PRIMARY KEY (url, fingerprint, key)) WITHOUT ROWID",
        """CREATE TRIGGER chunk_forgotten AFTER DELETE ON chunks BEGIN
            INSERT OR IGNORE INTO remote_deletes SELECT url, old.fingerprint, old.key FROM remotes;
            DELETE FROM remote_chunks WHERE key = old.key; END""",
    ),
    # 4: what the blobs of each fingerprint take, since namespaces may have limits of their own; and how many chunks
    # were ever deleted, so that other processes learn that what they hold in RAM may be gone. (No "INSERT OR IGNORE":
    # in a trigger, the outer statement's own conflict clause takes its place.)
    (
        "CREATE TABLE fingerprint_bytes (fingerprint TEXT PRIMARY KEY, nbytes INTEGER NOT NULL) WITHOUT ROWID",
        "INSERT INTO fingerprint_bytes SELECT fingerprint, sum(nbytes) FROM chunks GROUP BY fingerprint",
        "CREATE INDEX chunks_by_fingerprint_and_rank ON chunks (fingerprint, rank, id) WHERE nbytes > 0",
        "INSERT INTO state VALUES ('deletes', 0)",
        """CREATE TRIGGER chunk_charged AFTER INSERT ON chunks WHEN new.nbytes != 0 BEGIN
            INSERT INTO fingerprint_bytes SELECT new.fingerprint, 0
                WHERE new.fingerprint NOT IN (SELECT fingerprint FROM fingerprint_bytes);
            UPDATE fingerprint_bytes SET nbytes = nbytes + new.nbytes WHERE fingerprint = new.fingerprint; END""",
        """CREATE TRIGGER chunk_recharged AFTER UPDATE OF nbytes, fingerprint ON chunks
            WHEN new.nbytes != old.nbytes OR new.fingerprint != old.fingerprint BEGIN
            UPDATE fingerprint_bytes SET nbytes = nbytes - old.nbytes WHERE fingerprint = old.fingerprint;
            INSERT INTO fingerprint_bytes SELECT new.fingerprint, 0
                WHERE new.fingerprint NOT IN (SELECT fingerprint FROM fingerprint_bytes);
            UPDATE fingerprint_bytes SET nbytes = nbytes + new.nbytes WHERE fingerprint = new.fingerprint; END""",
        """CREATE TRIGGER chunk_gone AFTER DELETE ON chunks BEGIN
            UPDATE fingerprint_bytes SET nbytes = nbytes - old.nbytes WHERE fingerprint = old.fingerprint;
            UPDATE state SET value = value + 1 WHERE name = 'deletes'; END""",
    ),
    # 5: which chunks a cache was encoded behind, in order of `place`, so that it goes when one of them is deleted. The
    # neighbour's trace goes on through `is_chained` ones, to whatever stands behind those.
    (
        "CREATE TABLE behind (key TEXT NOT NULL, place INTEGER NOT NULL, neighbour TEXT NOT NULL, "
        "is_chained INTEGER NOT NULL, PRIMARY KEY (key, place)) WITHOUT ROWID",
        "CREATE INDEX behind_by_neighbour ON behind (neighbour)",
        "CREATE TRIGGER chunk_uncoupled AFTER DELETE ON chunks BEGIN DELETE FROM behind WHERE key = old.key; END",
    ),
)


def check_sqlite(path: Path) -> None:
    """Raise `StoreError` if Python's SQLite is too old for the statements used on the catalog at `path`."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        msg = (
            f"cannot use the catalog {path}: this Python's SQLite is {sqlite3.sqlite_version}, and {oldest} or later "
            "is needed. A newer Python (python.org, conda, uv) brings a newer SQLite"
        )
        raise StoreError(msg)


def bring_up_to_date(run: sqlite3.Connection, path: Path) -> int:
    """Bring the tables to `SCHEMA_VERSION`, inside the caller's transaction.

    Returns:
        The version that they had; 0 for an empty file.

    Raises:
        StoreError: If a newer version made the file at `path`.
    """
    version = int(run.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        msg = (
            f"{path} was made by a newer version of prophetkv_rag (its schema version is {version}, this one knows "
            f"{SCHEMA_VERSION}): upgrade prophetkv_rag, or use another directory"
        )
        raise StoreError(msg)
    if version < SCHEMA_VERSION:
        for step in _STEPS[version:]:
            for statement in step:
                run.execute(statement)
        run.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return version
