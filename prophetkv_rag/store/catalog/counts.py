"""What was ever counted on a directory: hits by tier, misses, evictions, writes that failed, deletions."""

from __future__ import annotations

from collections.abc import Mapping

from prophetkv_rag.errors import StoreError
from prophetkv_rag.store.catalog.catalog import Catalog

COUNTS = ("hits", "ram_hits", "remote_hits", "misses", "corrupt", "evictions", "failed_writes")
"""What is counted, by the names of `StoreStats`."""


_COUNT = "count "  # begins the names of such rows in `state`


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


def all_deletions(catalog: Catalog) -> int:
    """Return how many chunks any process has ever deleted; 0 if that cannot be read, as in an older catalog."""
    try:
        with catalog.transaction(is_write=False) as run:
            found = run.execute("SELECT value FROM state WHERE name = 'deletes'").fetchone()
    except StoreError:
        return 0
    return int(found[0]) if found else 0
