"""The Chroma hook: a collection whose records keep a KV cache each, and the store that belongs to a client.

In come a chromadb collection and an engine; out comes a collection that both frameworks' Chroma classes work on
unchanged. Begin reading with `collection.py`, the proxy; `caches.py` keeps the caches in step with what it writes and
deletes, `near.py` finds what is nearest to a record, `records.py` is Chroma's arguments as columns, `locks.py` keeps
two writers of one collection apart, `store.py` says where a client's caches lie.
"""

from prophetkv_rag.chroma.collection import KVCachingCollection
from prophetkv_rag.chroma.store import default_blob_directory, live_references, open_store
from prophetkv_rag.vector_stores import Record, in_documents

__all__ = [
    "KVCachingCollection",
    "Record",
    "default_blob_directory",
    "in_documents",
    "live_references",
    "open_store",
]
