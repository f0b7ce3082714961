"""What a store on disk holds, by collection, model and namespace, and what the next queries will cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prophetkv_rag.store.disk.cataloged import CatalogedStore


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


def usage(store: CatalogedStore) -> list[Usage]:
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


def nameless(store: CatalogedStore) -> int:
    """Return how many chunks are of no namespace that the catalog knows.

    Their blobs are of an early version, which does not say it, and no engine has been here since the catalog was lost.
    """
    with store.catalog.transaction(is_write=False) as run:
        query = "SELECT count(*) FROM chunks WHERE fingerprint NOT IN (SELECT fingerprint FROM identities)"
        return int(run.execute(query).fetchone()[0])


def _usage(*row: Any) -> Usage:
    missing_tokens, next_tokens, seconds_per_token = row[-3:]
    is_known = seconds_per_token or not missing_tokens
    times = [tokens * seconds_per_token if is_known else None for tokens in (missing_tokens, next_tokens)]
    values: tuple[Any, ...] = (*row[:-2], *times)
    return Usage(*values)
