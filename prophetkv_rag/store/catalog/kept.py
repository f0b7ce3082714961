"""What is kept with a chunk: other caches of its text, which go when it is deleted."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from prophetkv_rag.store import chunk_owner


def no_longer_kept(run: sqlite3.Connection, chunks: Iterable[str]) -> list[str]:
    """Drop deleted chunks' references, inside the caller's transaction; returns what nobody refers to any more."""
    dropped: list[str] = []
    for chunk in chunks:
        owner = (chunk_owner(chunk),)
        dropped += [key for (key,) in run.execute("SELECT key FROM refs WHERE owner = ?", owner)]
        run.execute("DELETE FROM refs WHERE owner = ?", owner)
    query = "SELECT 1 FROM refs WHERE key = ?"
    return [key for key in dict.fromkeys(dropped) if run.execute(query, (key,)).fetchone() is None]
