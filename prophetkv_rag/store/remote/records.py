"""What the catalog knows of a remote tier: what is there, and what is still to be deleted there."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Mapping

from prophetkv_rag.errors import StoreError
from prophetkv_rag.store.catalog import Catalog, Ranking

WHOLE = ""
"""In place of a key: everything of a fingerprint."""


class RemoteRecords:
    """The tables `remotes`, `remote_chunks` and `remote_deletes` of one remote; every method is one transaction.

    Whatever deletes a chunk from the catalog also notes it for deletion here (a trigger does), in the same transaction
    and whether or not the process has the remote at hand.
    """

    def __init__(self, catalog: Catalog, url: str) -> None:
        self._catalog = catalog
        self.url = url

    def register(self) -> None:
        """Let deletes be noted for this remote from now on."""
        with self._catalog.transaction() as run:
            run.execute("INSERT OR IGNORE INTO remotes (url) VALUES (?)", (self.url,))

    def has(self, key: str) -> bool:
        """Whether the chunk is known to be there."""
        with self._catalog.transaction(is_write=False) as run:
            query = "SELECT 1 FROM remote_chunks WHERE key = ? AND url = ?"
            return run.execute(query, (key, self.url)).fetchone() is not None

    def known(self) -> dict[str, str]:
        """Key -> fingerprint of the catalog's chunks that are known to be there."""
        with self._catalog.transaction(is_write=False) as run:
            query = "SELECT r.key, c.fingerprint FROM remote_chunks r JOIN chunks c ON c.key = r.key WHERE r.url = ?"
            return dict(run.execute(query, (self.url,)))

    def add(self, key: str, nbytes: int) -> bool:
        """Note that a chunk is there; returns whether the catalog (still) knows it, which is what is noted."""
        with self._catalog.transaction() as run:
            if run.execute("SELECT 1 FROM chunks WHERE key = ?", (key,)).fetchone() is None:
                return False
            run.execute("INSERT OR IGNORE INTO remotes (url) VALUES (?)", (self.url,))
            run.execute("INSERT OR REPLACE INTO remote_chunks VALUES (?, ?, ?)", (key, self.url, nbytes))
            return True

    def remove(self, keys: Iterable[str]) -> None:
        """Note that chunks are not there any more."""
        with self._catalog.transaction() as run:
            query = "DELETE FROM remote_chunks WHERE key = ? AND url = ?"
            run.executemany(query, [(key, self.url) for key in keys])

    def missing(self) -> list[tuple[str, str]]:
        """(key, fingerprint) of what is on disk and not known to be there, the most valuable first."""
        with self._catalog.transaction(is_write=False) as run:
            return run.execute(
                """SELECT key, fingerprint FROM chunks WHERE nbytes > 0
                AND key NOT IN (SELECT key FROM remote_chunks WHERE url = ?) ORDER BY rank DESC, id""",
                (self.url,),
            ).fetchall()

    def to_delete(self, limit: int = 1000) -> list[tuple[str, str]]:
        """(fingerprint, key) of what is to be deleted there."""
        with self._catalog.transaction(is_write=False) as run:
            query = "SELECT fingerprint, key FROM remote_deletes WHERE url = ? LIMIT ?"
            return run.execute(query, (self.url, limit)).fetchall()

    def num_to_delete(self) -> int:
        """How many deletes are waiting."""
        with self._catalog.transaction(is_write=False) as run:
            query = "SELECT count(*) FROM remote_deletes WHERE url = ?"
            return int(run.execute(query, (self.url,)).fetchone()[0])

    def is_doomed(self, fingerprint: str, key: str) -> bool:
        """Whether a chunk is to be deleted there, so that what is there now is not to be used.

        A catalog that was opened read-only and is of an older version knows of no deletes.
        """
        try:
            with self._catalog.transaction(is_write=False) as run:
                query = "SELECT 1 FROM remote_deletes WHERE url = ? AND fingerprint = ? AND key IN (?, ?)"
                return run.execute(query, (self.url, fingerprint, key, WHOLE)).fetchone() is not None
        except StoreError:
            return False

    def doom(self, fingerprint: str, key: str) -> None:
        """Note that something is to be deleted there."""
        with self._catalog.transaction() as run:
            run.execute("INSERT OR IGNORE INTO remote_deletes VALUES (?, ?, ?)", (self.url, fingerprint, key))

    def deleted(self, fingerprint: str, key: str) -> None:
        """Note that it has been deleted."""
        with self._catalog.transaction() as run:
            query = "DELETE FROM remote_deletes WHERE url = ? AND fingerprint = ? AND key = ?"
            run.execute(query, (self.url, fingerprint, key))

    def count_hits(self, hits: int) -> None:
        """Add to the number of caches that were read from there."""
        with self._catalog.transaction() as run:
            run.execute("UPDATE remotes SET hits = hits + ? WHERE url = ?", (hits, self.url))

    def totals(self) -> tuple[int, int, int, int]:
        """This catalog's chunks and bytes there, bytes of others (as counted last), and hits."""
        with self._catalog.transaction(is_write=False) as run:
            query = "SELECT count(*), coalesce(sum(nbytes), 0) FROM remote_chunks WHERE url = ?"
            chunks, nbytes = run.execute(query, (self.url,)).fetchone()
            found = run.execute("SELECT others, hits FROM remotes WHERE url = ?", (self.url,)).fetchone()
            return chunks, nbytes, *(found or (0, 0))

    def counted_at(self) -> float:
        """When the remote was counted last; 0 for never."""
        with self._catalog.transaction(is_write=False) as run:
            found = run.execute("SELECT counted_at FROM remotes WHERE url = ?", (self.url,)).fetchone()
            return float(found[0]) if found else 0.0

    def recount(self, sizes: Mapping[str, int], other_bytes: int) -> None:
        """Note what is there, from a list of it (key -> bytes), and the bytes of what is no blob."""
        with self._catalog.transaction() as run:
            chunks = {key for (key,) in run.execute("SELECT key FROM chunks")}
            run.execute("INSERT OR IGNORE INTO remotes (url) VALUES (?)", (self.url,))
            run.execute("DELETE FROM remote_chunks WHERE url = ?", (self.url,))
            ours = [(key, self.url, nbytes) for key, nbytes in sizes.items() if key in chunks]
            run.executemany("INSERT INTO remote_chunks VALUES (?, ?, ?)", ours)
            others = other_bytes + sum(nbytes for key, nbytes in sizes.items() if key not in chunks)
            run.execute("UPDATE remotes SET others = ?, counted_at = ? WHERE url = ?", (others, time.time(), self.url))

    def victims(
        self, ranking: Ranking, key: str, *, nbytes: int, needed: int, wanted: int
    ) -> list[tuple[str, str]] | None:
        """Return (key, fingerprint) of what to evict there, so that `needed` bytes become free for a chunk.

        `None` if that would cost more than it gains. What only other machines' catalogs know is not ours to evict.

        Args:
            ranking: The rule.
            key: The chunk that wants in: only what ranks lower may be evicted for it.
            nbytes: Its size.
            needed: Bytes that have to become free.
            wanted: Bytes, more than that, to free while all is being ranked, if what ranks lower has them.
        """
        with self._catalog.transaction(is_write=False) as run:
            costs = dict(run.execute("SELECT fingerprint, seconds_per_token FROM identities"))
            newcomer = ranking.rank_of(run, key, nbytes=nbytes)
            rows = run.execute(
                """SELECT c.key, c.fingerprint, r.nbytes, c.uses, c.last_use, c.score, c.num_tokens
                FROM remote_chunks r JOIN chunks c ON c.key = r.key WHERE r.url = ?""",
                (self.url,),
            ).fetchall()
        ranked = sorted(
            (ranking.rank(*use, seconds_per_token=costs.get(fingerprint), nbytes=size), other, fingerprint, size)
            for other, fingerprint, size, *use in rows
        )
        chosen: list[tuple[str, str]] = []
        freed = 0
        for rank, other, fingerprint, size in ranked:
            if freed >= wanted or rank >= newcomer:
                break
            if other != key:
                chosen.append((other, fingerprint))
                freed += size
        return chosen if freed >= needed else None


def others(catalog: Catalog, url: str | None) -> dict[str, int]:
    """Return the remotes that a catalog knows besides `url`, and how many deletes each is still to be told.

    A store that is given another remote, or none, goes on noting what is deleted for the old one, should it come back.
    """
    with catalog.transaction(is_write=False) as run:
        query = "SELECT r.url, count(d.key) FROM remotes r LEFT JOIN remote_deletes d ON d.url = r.url GROUP BY r.url"
        return {other: waiting for other, waiting in run.execute(query) if other != url}


def give_up(catalog: Catalog, url: str) -> None:
    """Forget a remote: what is there stays there, and nothing is noted for it any more."""
    with catalog.transaction() as run:
        for table in ("remotes", "remote_chunks", "remote_deletes"):
            run.execute(f"DELETE FROM {table} WHERE url = ?", (url,))


def doom_all(run: sqlite3.Connection) -> None:
    """Note, inside a transaction, that what every remote has of the catalog's chunks is to be deleted there.

    The chunks stay, and may be uploaded anew.
    """
    run.execute("INSERT OR IGNORE INTO remote_deletes SELECT url, fingerprint, key FROM remotes, chunks")
    run.execute("DELETE FROM remote_chunks")


def doom_whole(run: sqlite3.Connection, fingerprints: Iterable[str]) -> None:
    """Note, inside a transaction, that everything of these fingerprints is to be deleted from every remote."""
    for fingerprint in fingerprints:
        run.execute("DELETE FROM remote_deletes WHERE fingerprint = ?", (fingerprint,))
        run.execute(f"INSERT INTO remote_deletes SELECT url, ?, '{WHOLE}' FROM remotes", (fingerprint,))
