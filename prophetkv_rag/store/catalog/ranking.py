"""Which chunk caches are worth their bytes: what is evicted first when the disk tier is full, and what gets in.

The value of a cache is what it saves (seconds to compute it again, times how much it is used, the recent uses counting
most) per byte. A use counts half after `HALF_LIFE` further uses of the store. Time is the number of uses so far, not
the clock, so a clock that jumps changes nothing. Halving all scores alike never changes their order, so a chunk's rank
is written when it is used and stays true until it is used again: an index on it is all that eviction needs.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prophetkv_rag.store.catalog.namespaces import marks

Eviction = Literal["value", "lru"]

HALF_LIFE = 2000
"""Uses of any chunks after which one use counts half."""
_NEVER = -1e6  # log2 of no use at all: below every use, but still ordered by cost per byte
_UNKNOWN_COST = 1e-3  # seconds a token, until the model has been measured


@dataclass(frozen=True, slots=True)
class Ranking:
    """Reads and writes the ranks in the catalog; every method runs inside the caller's transaction."""

    eviction: Eviction = "value"

    def adopt(self, run: sqlite3.Connection) -> None:
        """Rank everything anew if the catalog was ranked by the other rule."""
        found = run.execute("SELECT value FROM state WHERE name = 'eviction'").fetchone()
        if found is not None and found[0] == self.eviction:
            return
        run.execute("INSERT OR REPLACE INTO state VALUES ('eviction', ?)", (self.eviction,))
        self._rank(run, [row[0] for row in run.execute("SELECT key FROM chunks")])

    def record_uses(self, run: sqlite3.Connection, keys: Iterable[str]) -> None:
        """Count one use of each key, in order."""
        keys = list(keys)
        if not keys:
            return
        clock = run.execute("SELECT value FROM state WHERE name = 'clock'").fetchone()[0]
        for key in keys:
            clock += 1
            found = run.execute("SELECT uses, score FROM chunks WHERE key = ?", (key,)).fetchone()
            if found is not None:
                now = clock / HALF_LIFE
                score = _log2_sum(found[1], now) if found[0] else now
                run.execute(
                    "UPDATE chunks SET uses = uses + 1, last_use = ?, score = ? WHERE key = ?", (clock, score, key)
                )
        run.execute("UPDATE state SET value = ? WHERE name = 'clock'", (clock,))
        self._rank(run, set(keys))

    def put_in(self, run: sqlite3.Connection, key: str, *, is_used: bool) -> None:
        """Rank a chunk whose blob has just been written; by plain LRU that is a use, whoever wrote it."""
        if self.eviction == "lru" and not is_used:
            run.execute("UPDATE state SET value = value + 1 WHERE name = 'clock'")
            run.execute(
                "UPDATE chunks SET last_use = (SELECT value FROM state WHERE name = 'clock') WHERE key = ?", (key,)
            )
        self._rank(run, [key])

    def victims(
        self,
        run: sqlite3.Connection,
        *,
        needed: int,
        rank: float,
        spared: Collection[str],
        among: Sequence[str] | None = None,
    ) -> list[str] | None:
        """Return the keys to evict so that `needed` bytes become free, or `None` if that would cost more than it gains.

        Args:
            run: The transaction.
            needed: Bytes; nothing is to be evicted if that is 0 or less.
            rank: Rank of what wants in: only what ranks lower may be evicted for it.
            spared: Keys that are in use.
            among: Fingerprints whose chunks may be evicted; `None` for any.
        """
        chosen: list[str] = []
        if needed <= 0:
            return chosen
        whose = "" if among is None else f"AND fingerprint IN ({marks(among)})"
        query = f"SELECT key, nbytes FROM chunks WHERE nbytes > 0 AND rank < ? {whose} ORDER BY rank, id"
        for key, nbytes in run.execute(query, (rank, *(among or ()))):
            if key not in spared:
                chosen.append(key)
                needed -= nbytes
                if needed <= 0:
                    return chosen
        return None

    def rank_of(self, run: sqlite3.Connection, key: str, *, nbytes: int) -> float:
        """Return the rank that a chunk has as a blob of `nbytes`; by plain LRU a newcomer outranks all."""
        if self.eviction == "lru":
            return math.inf
        return next((rank for _, rank in self._ranks(run, [key], nbytes)), _NEVER)

    def _rank(self, run: sqlite3.Connection, keys: Iterable[str]) -> None:
        run.executemany("UPDATE chunks SET rank = ? WHERE key = ?", [(r, key) for key, r in self._ranks(run, keys)])

    def _ranks(
        self, run: sqlite3.Connection, keys: Iterable[str], nbytes: int | None = None
    ) -> Iterator[tuple[str, float]]:
        costs = dict(run.execute("SELECT fingerprint, seconds_per_token FROM identities"))
        for key in keys:
            found = run.execute(
                "SELECT uses, last_use, score, num_tokens, nbytes, fingerprint FROM chunks WHERE key = ?", (key,)
            ).fetchone()
            if found is None:
                continue
            uses, last_use, score, num_tokens, stored, fingerprint = found
            cost = costs.get(fingerprint)
            yield key, self.rank(uses, last_use, score, num_tokens, seconds_per_token=cost, nbytes=nbytes or stored)

    def rank(
        self,
        uses: int,
        last_use: int,
        score: float,
        num_tokens: int,
        *,
        seconds_per_token: float | None,
        nbytes: int,
    ) -> float:
        """Return the rank of a chunk with this history as a blob of `nbytes`; `None` for a cost that is not known."""
        if self.eviction == "lru":
            return float(last_use)
        seconds = max(1, num_tokens) * (seconds_per_token or _UNKNOWN_COST)
        return (score if uses else _NEVER) + math.log2(seconds / max(1, nbytes))


def _log2_sum(one: float, other: float) -> float:
    """Return log2(2**one + 2**other)."""
    high, low = max(one, other), min(one, other)
    return high + math.log2(1 + 2.0 ** (low - high))
