"""Caches that follow the records of a vector store, whichever it is: written with them, deleted with them.

In come records (id, text, metadata) and what is done to them; out come caches in the engine's store, owned by the
vector store. Begin reading with `link.py`: before and after a write, a delete, and all that is there; `calls.py` runs
a call between the two, plain or awaited. `caches.py` is what Chroma's own link has in common with it, `records.py` what
a vector store tells of its records, `ledger.py` knows which of them carries which cache, `document_order.py` which
chunks stand before which, `neighbours.py` encodes chunks again behind those that are near (`near_records.py`), and
`engine.py` says what is needed of an engine.
"""

from prophetkv_rag.vector_stores.caches import QUERY_SIZE, OwnedCaches, Progress, batches
from prophetkv_rag.vector_stores.calls import Change, Delete, Renewal, Write, arun, arun_alone, is_inside, run
from prophetkv_rag.vector_stores.document_order import Record, behind_node, in_documents
from prophetkv_rag.vector_stores.engine import CachingEngine
from prophetkv_rag.vector_stores.link import StoreLink, store_name
from prophetkv_rag.vector_stores.near_records import NearRecords
from prophetkv_rag.vector_stores.neighbours import NeighbourPass, Placed
from prophetkv_rag.vector_stores.records import UnreadableError

__all__ = [
    "QUERY_SIZE",
    "CachingEngine",
    "Change",
    "Delete",
    "NearRecords",
    "NeighbourPass",
    "OwnedCaches",
    "Placed",
    "Progress",
    "Record",
    "Renewal",
    "StoreLink",
    "UnreadableError",
    "Write",
    "arun",
    "arun_alone",
    "batches",
    "behind_node",
    "in_documents",
    "is_inside",
    "run",
    "store_name",
]
