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
        in_remote: Chunks with a cache in the store's remote tier, as far as the catalog knows; 0 without one.
        remote_nbytes: Bytes there.
        missing_tokens: Tokens that are computed when a prompt next has them: their caches are in no tier.
        missing_s: Seconds that takes in total, as measured while indexing; `None` if that was never measured.
        next_chunk_s: Seconds of computing that a chunk of the next prompt costs on average, if chunks are asked for as
            often as so far (and each once more); `None` if it was never measured.
    """

    owner: str
    model: str
    namespace: str
    chunks: int
    stored: int
    tokens: int
    nbytes: int
    uses: int
    in_remote: int
    remote_nbytes: int
    missing_tokens: int
    missing_s: float | None
    next_chunk_s: float | None


def usage(store: DiskStore) -> list[Usage]:
    """Return one entry per owner and model, the largest first."""
    url = None if store.remote is None else store.remote.records.url
    with store.catalog.transaction(is_write=False) as run:
        rows = run.execute(
            """SELECT coalesce(r.owner, ''), coalesce(i.model, c.fingerprint), coalesce(i.namespace, ''), count(*),
                sum(c.nbytes > 0), sum(c.num_tokens), sum(c.nbytes), sum(c.uses),
                count(t.key), coalesce(sum(t.nbytes), 0),
                sum(CASE WHEN c.nbytes > 0 OR t.key IS NOT NULL THEN 0 ELSE c.num_tokens END),
                sum(CASE WHEN c.nbytes > 0 OR t.key IS NOT NULL THEN 0.0 ELSE c.num_tokens * (c.uses + 1.0) END)
                    / sum(c.uses + 1.0),
                coalesce(max(i.seconds_per_token), 0)
            FROM chunks c LEFT JOIN refs r ON r.key = c.key LEFT JOIN identities i ON i.fingerprint = c.fingerprint
                LEFT JOIN remote_chunks t ON t.key = c.key AND t.url = ?
            GROUP BY 1, c.fingerprint ORDER BY 7 DESC, 1""",
            (url,),
        ).fetchall()
    return [_usage(*row) for row in rows]


def nameless(store: DiskStore) -> int:
    """Return how many chunks are of no namespace that the catalog knows.

    Their blobs are of an early version, which does not say it, and no engine has been here since the catalog was lost.
    """
    with store.catalog.transaction(is_write=False) as run:
        query = "SELECT count(*) FROM chunks WHERE fingerprint NOT IN (SELECT fingerprint FROM identities)"
        return int(run.execute(query).fetchone()[0])


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


def hits_by_tier(counts: Mapping[str, int]) -> dict[str, int]:
    """Return how many caches prompts found in each tier, from counts by the names of `StoreStats`."""
    elsewhere = counts["ram_hits"] + counts["remote_hits"]
    return {"ram": counts["ram_hits"], "disk": counts["hits"] - elsewhere, "remote": counts["remote_hits"]}


def _usage(*row: Any) -> Usage:
    missing_tokens, next_tokens, seconds_per_token = row[-3:]
    is_known = seconds_per_token or not missing_tokens
    times = [tokens * seconds_per_token if is_known else None for tokens in (missing_tokens, next_tokens)]
    values: tuple[Any, ...] = (*row[:-2], *times)
    return Usage(*values)
