"""The list of a store's chunks: which there are, how their texts are recognised, who refers to them.

One SQLite file that several processes may share; it opens no blob and no remote. In come rows, out come rows and
the order in which they are evicted. Begin reading with `schema.py`, then `catalog.py`; `namespaces.py` says whom a
chunk is charged to, `traces.py` whose trace is in whose cache, `ranking.py` which is worth its bytes, `counts.py` what
was ever counted.
"""

from prophetkv_rag.store.catalog import namespaces
from prophetkv_rag.store.catalog.catalog import UNKNOWN_OWNER, Catalog, CatalogRow
from prophetkv_rag.store.catalog.counts import add_counts, all_counts, all_deletions, hits_by_tier
from prophetkv_rag.store.catalog.file import CorruptCatalogError, damaged, set_aside
from prophetkv_rag.store.catalog.ranking import Eviction, Ranking

__all__ = [
    "UNKNOWN_OWNER",
    "Catalog",
    "CatalogRow",
    "CorruptCatalogError",
    "Eviction",
    "Ranking",
    "add_counts",
    "all_counts",
    "all_deletions",
    "damaged",
    "hits_by_tier",
    "namespaces",
    "set_aside",
]
