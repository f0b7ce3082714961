"""The catalog's file: how it is opened, and what becomes of one that is damaged."""

from __future__ import annotations

import sqlite3
from pathlib import Path

BUSY_TIMEOUT_S = 60.0


def connect(uri: str) -> sqlite3.Connection:
    """Open a file that several threads and processes use; a write waits for the others' for a minute at most."""
    return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def connect_read_only(uri: str) -> sqlite3.Connection:
    """Open a file to be read only, also in a directory that cannot be written to; `sqlite3.Error` if it is none."""
    connection = connect(uri + "?mode=ro")
    try:
        connection.execute("SELECT count(*) FROM chunks WHERE id = 0")
    except sqlite3.OperationalError:  # a WAL database cannot be opened where its helper files cannot be made
        connection.close()
        connection = connect(uri + "?mode=ro&immutable=1")
        connection.execute("SELECT count(*) FROM chunks WHERE id = 0")
    return connection


def damaged(path: Path) -> Path:
    """Return where a damaged catalog is kept."""
    return path.with_name(f"{path.name}.damaged")


def set_aside(path: Path) -> None:
    """Rename a damaged catalog; its helper files would be taken for the new one's."""
    path.replace(damaged(path))
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
