"""Where chunk caches are kept: the contract, a cache and its key, and the store in RAM.

In comes a `ChunkCache` under a key that names the model and every token; the same comes out again, or nothing: a store
never hands out what it cannot prove. Begin reading with `base.py` (the contract) and `chunk_cache.py`; `text_entry.py`
is how prompts find a chunk again, `reports.py` what a store tells of itself. The rooms behind build the store on disk,
in this order: `encryption/`, `blobs/` (a cache as one file), `catalog/` (the list of them), `remote/` (the
tier behind the disk) and `disk/`, which is opened by `open_disk_store`.
"""

from prophetkv_rag.store.base import ChunkStore, Lookup, Policy
from prophetkv_rag.store.chunk_cache import ALONE, LAYOUT_VERSION, Behind, CacheIdentity, ChunkCache
from prophetkv_rag.store.directory_lock import DirectoryLock, has_locks
from prophetkv_rag.store.failures import Failures
from prophetkv_rag.store.files import (
    TEMPORARY_SUFFIX,
    Source,
    can_write,
    make_private_directory,
    read_fully,
    read_into_fresh,
    touch_private,
    write_file,
)
from prophetkv_rag.store.keys import check_key, chunk_owner, is_key
from prophetkv_rag.store.memory import MemoryStore
from prophetkv_rag.store.packed_cache import PackedCache, PackedRows
from prophetkv_rag.store.reports import RemoteStats, StoreStats, VerifyReport
from prophetkv_rag.store.text_entry import EntryColumns, TextEntry

__all__ = [
    "ALONE",
    "LAYOUT_VERSION",
    "TEMPORARY_SUFFIX",
    "Behind",
    "CacheIdentity",
    "ChunkCache",
    "ChunkStore",
    "DirectoryLock",
    "EntryColumns",
    "Failures",
    "Lookup",
    "MemoryStore",
    "PackedCache",
    "PackedRows",
    "Policy",
    "RemoteStats",
    "Source",
    "StoreStats",
    "TextEntry",
    "VerifyReport",
    "can_write",
    "check_key",
    "chunk_owner",
    "has_locks",
    "is_key",
    "make_private_directory",
    "read_fully",
    "read_into_fresh",
    "touch_private",
    "write_file",
]
