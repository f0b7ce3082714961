"""The list of stored chunk caches and of who refers to them: one SQLite file that several processes may share."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prophetkv_rag.errors import StoreError
from prophetkv_rag.store import Behind, EntryColumns, TextEntry, chunk_owner
from prophetkv_rag.store.catalog.file import CatalogFile
from prophetkv_rag.store.catalog.kept import no_longer_kept
from prophetkv_rag.store.catalog.traces import behind_of, doom_remote, drop_traced, followed, note_behind, traced

UNKNOWN_OWNER = ""
"""Owner of chunks that were found without a catalog: whoever drops such a chunk deletes it."""

_ROWS_AT_ONCE = 500  # few enough objects at a time that the garbage collector does not look through all of them


@dataclass(frozen=True, slots=True)
class CatalogRow:
    """One chunk as the catalog knows it.

    Attributes:
        nbytes: Its blob's size, or 0 if it has none (evicted, lost, not yet).
        behind: What its cache was encoded behind; `None` to leave what the catalog knows of that.
    """

    key: str
    fingerprint: str
    num_tokens: int
    nbytes: int
    behind: Behind | None = None


class Catalog(CatalogFile):
    """Every method is one transaction, and safe to call from several threads and processes.

    A row whose blob was lost or evicted stays, with `nbytes` 0: its text is still recognised in prompts, so the first
    query that needs the chunk computes it again.
    """

    def upsert(self, row: CatalogRow, entry: TextEntry | None) -> None:
        """Add a chunk, or renew it; without `entry` a known text entry stays."""
        text = (None, None, None) if entry is None else (entry.anchor, entry.length, entry.digest)
        with self.transaction() as run:
            run.execute(
                """INSERT INTO chunks (key, fingerprint, num_tokens, nbytes, anchor, length, digest, noted_at)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?)
                ON CONFLICT (key) DO UPDATE SET fingerprint = excluded.fingerprint, num_tokens = excluded.num_tokens,
                nbytes = CASE WHEN excluded.nbytes THEN excluded.nbytes ELSE nbytes END,
                anchor = coalesce(excluded.anchor, anchor),
                length = coalesce(excluded.length, length), digest = coalesce(excluded.digest, digest)""",
                (row.key, row.fingerprint, row.num_tokens, row.nbytes, *text, time.time()),
            )
            if row.behind is not None:
                note_behind(run, row.key, row.behind)

    def mark_lost(self, keys: Iterable[str]) -> None:
        """Note that the blobs of these keys are gone."""
        with self.transaction() as run:
            run.executemany("UPDATE chunks SET nbytes = 0 WHERE key = ?", [(key,) for key in keys])

    def __contains__(self, key: str) -> bool:
        with self.transaction(is_write=False) as run:
            return run.execute("SELECT 1 FROM chunks WHERE key = ?", (key,)).fetchone() is not None

    def known(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that are chunks here."""
        with self.transaction(is_write=False) as run:
            query = "SELECT key FROM chunks WHERE key IN (SELECT value FROM json_each(?))"
            return {key for (key,) in run.execute(query, (json.dumps(list(keys)),))}

    def delete(self, run: sqlite3.Connection, keys: Iterable[str]) -> tuple[int, list[str]]:
        """Drop chunks and all references to them, inside a transaction.

        What was kept with a chunk goes with it (`keep_with`).

        Returns:
            How many chunks there were; and the keys of others that have no cache any more: of those that bear their
            trace, and of what was kept with them. The caller removes the files of all.
        """
        keys = list(keys)
        kept = no_longer_kept(run, keys)
        found = [*traced(run, keys), *kept]
        keys += kept
        count = 0
        for key in keys:
            count += run.execute("DELETE FROM chunks WHERE key = ?", (key,)).rowcount
            run.execute("DELETE FROM refs WHERE key = ?", (key,))
        drop_traced(run, found)
        return count, found

    def keep_with(self, key: str, chunk: str) -> None:
        """Keep what is stored under `key` for as long as a chunk is known; nothing of one that is not."""
        with self.transaction() as run:
            run.execute(
                "INSERT OR IGNORE INTO refs (owner, key, noted_at) SELECT ?, ?, ? WHERE ? IN (SELECT key FROM chunks)",
                (chunk_owner(chunk), key, time.time(), chunk),
            )

    def drop_traced(self, keys: Iterable[str]) -> None:
        """Note that the caches of these keys are gone, here and (soon) in remote tiers, with what they stood behind."""
        with self.transaction() as run:
            drop_traced(run, keys)

    def replaced(self, key: str) -> None:
        """Note that a chunk's blob is about to be another one: remote tiers must not keep the one they have."""
        with self.transaction() as run:
            doom_remote(run, key)

    def behind(self, key: str) -> Behind:
        """What a chunk's cache is encoded behind, or was when it had one; without what it bears `through` that."""
        with self.transaction(is_write=False) as run:
            return behind_of(run, key)

    def followed(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that other chunks are chained behind."""
        with self.transaction(is_write=False) as run:
            return followed(run, keys)

    def add_references(self, owner: str, keys: Iterable[str]) -> None:
        """Note that `owner` refers to these keys."""
        with self.transaction() as run:
            run.executemany(
                "INSERT OR IGNORE INTO refs (owner, key, noted_at) VALUES (?, ?, ?)",
                [(owner, key, time.time()) for key in keys],
            )

    def unreferenced_without(self, run: sqlite3.Connection, owner: str, keys: Iterable[str]) -> list[str]:
        """Drop `owner`'s references inside a transaction; returns the keys that nobody refers to any more.

        Who referred to a chunk that was found without a catalog is not known, so it goes with the first who drops it.
        """
        unreferenced = []
        for key in keys:
            dropped = run.execute("DELETE FROM refs WHERE key = ? AND owner IN (?, ?)", (key, owner, UNKNOWN_OWNER))
            if dropped.rowcount and run.execute("SELECT 1 FROM refs WHERE key = ?", (key,)).fetchone() is None:
                unreferenced.append(key)
        return unreferenced

    def has_references(self, key: str) -> bool:
        """Whether anybody refers to this key."""
        with self.transaction(is_write=False) as run:
            return run.execute("SELECT 1 FROM refs WHERE key = ?", (key,)).fetchone() is not None

    def references(self, owner: str) -> list[str]:
        """Keys that `owner` refers to."""
        with self.transaction(is_write=False) as run:
            return [key for (key,) in run.execute("SELECT key FROM refs WHERE owner = ?", (owner,))]

    def entries(self, fingerprint: str, *, after_id: int = 0) -> tuple[EntryColumns, int]:
        """Chunks of one identity that have an entry and a larger id, in order of ids; and the last one's id."""
        keys: list[str] = []
        anchors: list[int] = []
        lengths: list[int] = []
        digests: list[str] = []
        with self.transaction(is_write=False) as run:
            rows = run.execute(
                """SELECT id, key, anchor, length, digest FROM chunks
                WHERE fingerprint = ? AND id > ? AND digest IS NOT NULL ORDER BY id""",
                (fingerprint, after_id),
            )
            while part := rows.fetchmany(_ROWS_AT_ONCE):
                ids, *columns = zip(*part, strict=True)
                keys += columns[0]
                anchors += columns[1]
                lengths += columns[2]
                digests += columns[3]
                after_id = ids[-1]
        return EntryColumns(keys, anchors, lengths, digests), after_id

    def keys_after(self, fingerprint: str, after_id: int) -> tuple[list[str], int]:
        """Keys of one identity's chunks with a larger id, in order of ids; and the last one's id."""
        with self.transaction(is_write=False) as run:
            rows = run.execute(
                "SELECT id, key FROM chunks WHERE fingerprint = ? AND id > ? ORDER BY id", (fingerprint, after_id)
            ).fetchall()
        return [key for _, key in rows], rows[-1][0] if rows else after_id

    def rows(self) -> list[CatalogRow]:
        """All chunks."""
        with self.transaction(is_write=False) as run:
            return [CatalogRow(*row) for row in run.execute("SELECT key, fingerprint, num_tokens, nbytes FROM chunks")]

    def nbytes(self) -> int:
        """Bytes of all blobs."""
        with self.transaction(is_write=False) as run:
            return int(run.execute("SELECT value FROM state WHERE name = 'nbytes'").fetchone()[0])

    def nbytes_of(self, key: str) -> int:
        """Bytes of a chunk's blob as far as the catalog knows; 0 for none."""
        with self.transaction(is_write=False) as run:
            found = run.execute("SELECT nbytes FROM chunks WHERE key = ?", (key,)).fetchone()
            return int(found[0]) if found else 0

    def entry_of(self, key: str) -> TextEntry | None:
        """How a chunk's text is recognised, if that is known."""
        with self.transaction(is_write=False) as run:
            found = run.execute("SELECT anchor, length, digest FROM chunks WHERE key = ?", (key,)).fetchone()
            return None if found is None or found[2] is None else TextEntry(*found)

    def totals(self) -> tuple[int, int, int]:
        """Chunks, tokens and bytes whose blobs are there."""
        with self.transaction(is_write=False) as run:
            chunks, tokens, nbytes = run.execute(
                "SELECT count(*), coalesce(sum(num_tokens), 0), coalesce(sum(nbytes), 0) FROM chunks WHERE nbytes > 0"
            ).fetchone()
            return chunks, tokens, nbytes

    def describe(self, fingerprint: str, model: str, namespace: str, seconds_per_token: float | None) -> None:
        """Note what a fingerprint stands for; a `None` leaves the known cost of its tokens."""
        with self.transaction() as run:
            run.execute(
                """INSERT INTO identities VALUES (?, ?, ?, coalesce(?, 0)) ON CONFLICT (fingerprint) DO UPDATE SET
                model = excluded.model, namespace = excluded.namespace,
                seconds_per_token = coalesce(?, seconds_per_token)""",
                (fingerprint, model, namespace, seconds_per_token, seconds_per_token),
            )

    def seconds_per_token(self, fingerprint: str) -> float | None:
        """What a token took to compute when that was last measured; `None` if it never was."""
        with self.transaction(is_write=False) as run:
            query = "SELECT seconds_per_token FROM identities WHERE fingerprint = ?"
            found = run.execute(query, (fingerprint,)).fetchone()
            return float(found[0]) if found is not None and found[0] else None

    def check(self) -> str:
        """Read the whole file; "" if all is well, or what SQLite found."""
        with self.transaction(is_write=False) as run:
            found = str(run.execute("PRAGMA integrity_check(1)").fetchone()[0])
            return "" if found == "ok" else found

    def can_write(self) -> bool:
        """Whether something can be written now; changes nothing."""
        try:
            with self.transaction() as run:
                run.execute("UPDATE state SET value = value WHERE name = 'clock'")
        except StoreError:
            return False
        return True
