"""Whose trace is in whose cache: the table `behind`, by which a deleted chunk takes along what was encoded behind it.

Every function runs inside the caller's transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence

from prophetkv_rag.store import Behind


def note_behind(run: sqlite3.Connection, key: str, behind: Behind) -> None:
    """Note which chunks a chunk's cache was encoded behind."""
    run.execute("DELETE FROM behind WHERE key = ?", (key,))
    run.executemany(
        "INSERT INTO behind (key, place, neighbour, is_chained) VALUES (?, ?, ?, ?)",
        [(key, place, neighbour, behind.is_chained) for place, neighbour in enumerate(behind.keys)],
    )


def behind_of(run: sqlite3.Connection, key: str) -> Behind:
    """Return which chunks a cache was encoded behind; what it bears `through` those is not told."""
    rows = run.execute("SELECT neighbour, is_chained FROM behind WHERE key = ? ORDER BY place", (key,)).fetchall()
    return Behind(tuple(neighbour for neighbour, _ in rows), is_chained=any(chained for _, chained in rows))


def followed(run: sqlite3.Connection, keys: Sequence[str]) -> set[str]:
    """Return those of these keys that other chunks are chained behind."""
    query = "SELECT neighbour FROM behind WHERE is_chained AND neighbour IN (SELECT value FROM json_each(?))"
    return {key for (key,) in run.execute(query, (json.dumps(keys),))}


def traced(run: sqlite3.Connection, keys: Sequence[str]) -> list[str]:
    """Return the keys of all other chunks whose caches bear the trace of one of these."""
    seen, found, new = set(keys), list[str](), list(keys)
    query = "SELECT DISTINCT key FROM behind WHERE neighbour IN (SELECT value FROM json_each(?))"
    while new:
        new = [key for (key,) in run.execute(query, (json.dumps(new),)) if key not in seen]
        seen.update(new)
        found += new
        if "is_chained" not in query:  # from here on: whose cache was made of theirs as they are stored
            query += " AND is_chained"
    return found


def drop_traced(run: sqlite3.Connection, keys: Iterable[str]) -> None:
    """Note that these caches are gone; a remote tier is to delete them as soon as it answers."""
    for key in keys:
        run.execute("UPDATE chunks SET nbytes = 0 WHERE key = ?", (key,))
        run.execute("DELETE FROM behind WHERE key = ?", (key,))
        doom_remote(run, key)


def doom_remote(run: sqlite3.Connection, key: str) -> None:
    """Note that what remote tiers have of a chunk is to be deleted there; what is written next is uploaded."""
    run.execute("DELETE FROM remote_chunks WHERE key = ?", (key,))
    run.execute(
        "INSERT OR IGNORE INTO remote_deletes SELECT r.url, c.fingerprint, c.key FROM remotes r, chunks c "
        "WHERE c.key = ?",
        (key,),
    )
