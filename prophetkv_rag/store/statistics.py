"""What a store on disk holds, by collection, model and namespace, and what the next queries will cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prophetkv_rag.store.catalog import Catalog
    from prophetkv_rag.store.disk import DiskStore

COUNTS = ("hits", "ram_hits", "remote_hits", "misses", "corrupt", "evictions", "failed_writes")
"""What is counted, by the names of `StoreStats`."""
_COUNT = "count "  # begins the names of such rows in `state`


@dataclass(frozen=True, slots=True)
class Usage:
    """One owner's chunks of one model; a chunk that two collections share counts for both.

    Attributes:
        owner: A collection's id, `"engine"`, or "" for chunks that nobody refers to.
        model: Name and start of the fingerprint; the identity's fingerprint where the model is not known.
        namespace: `ProphetKVConfig.namespace`.
        chunks: Chunks known.
        stored: Those with a cache on disk.
        tokens: Tokens of all chunks.
        nbytes: Bytes on disk.
        uses: How often prompts had them.
        missing_tokens: Tokens that are computed when a prompt next has them.
        missing_s: Seconds that takes in total, as measured while indexing; `None` if that was never measured.
    """

    owner: str
    model: str
    namespace: str
    chunks: int
    stored: int
    tokens: int
    nbytes: int
    uses: int
    missing_tokens: int
    missing_s: float | None


def usage(store: DiskStore) -> list[Usage]:
    """Return one entry per owner and model, the largest first."""
    with store.catalog.transaction(is_write=False) as run:
        rows = run.execute(
            """SELECT coalesce(r.owner, ''), coalesce(i.model, c.fingerprint), coalesce(i.namespace, ''), count(*),
                sum(c.nbytes > 0), sum(c.num_tokens), sum(c.nbytes), sum(c.uses),
                sum(CASE WHEN c.nbytes > 0 THEN 0 ELSE c.num_tokens END), coalesce(max(i.seconds_per_token), 0)
            FROM chunks c LEFT JOIN refs r ON r.key = c.key LEFT JOIN identities i ON i.fingerprint = c.fingerprint
            GROUP BY 1, c.fingerprint ORDER BY 7 DESC, 1"""
        ).fetchall()
    return [_usage(*row) for row in rows]


def add_counts(catalog: Catalog, counts: Mapping[str, int]) -> None:
    """Add to the totals of everything that was ever counted on this directory; by the names of `StoreStats`."""
    with catalog.transaction() as run:
        run.executemany(
            "INSERT INTO state VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            [(_COUNT + name, count) for name, count in counts.items()],
        )


def all_counts(catalog: Catalog) -> dict[str, int]:
    """Return the totals of what all processes counted on this directory; a running one adds its own every 64 uses."""
    with catalog.transaction(is_write=False) as run:
        found = dict(run.execute("SELECT name, value FROM state WHERE name GLOB ?", (_COUNT + "*",)))
    return {name: int(found.get(_COUNT + name, 0)) for name in COUNTS}


def _usage(*row: Any) -> Usage:
    missing_tokens, seconds_per_token = row[-2:]
    seconds = missing_tokens * seconds_per_token if seconds_per_token or not missing_tokens else None
    values: tuple[Any, ...] = (*row[:-1], seconds)
    return Usage(*values)
