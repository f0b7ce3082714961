"""The store on disk: RAM over disk, and over a remote tier where there is one.

In come caches to keep and keys to find; out come checked caches, within byte limits that hold at every moment. Begin
reading with `opening.py` and `store.py`, the facade: `settings.py` and `directory.py` are what it begins with,
`reader.py` and `writer.py` are its two ways, `stale.py` drops what bears a deleted chunk's trace, `write_behind.py` is
the thread that nobody waits for, `space.py` makes room, `leases.py` says what is in use, `ram.py` and `read_ahead.py`
are the RAM tier, `room.py` says what is free, `counters.py` counts, `tiered.py` puts the remote behind it. What people
do with a store by hand follows: `upkeep.py` (verify, gc, clear), `statistics.py`, `transfer.py` (export,
import), `rekeying.py`.
"""

from prophetkv_rag.store.disk.key_mark import must_be_unlocked
from prophetkv_rag.store.disk.leases import writing
from prophetkv_rag.store.disk.opening import open_disk_store
from prophetkv_rag.store.disk.rekeying import rekey
from prophetkv_rag.store.disk.room import default_disk_bytes, free_disk, free_memory
from prophetkv_rag.store.disk.statistics import Usage, nameless, usage
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.tiered import TieredStore
from prophetkv_rag.store.disk.transfer import export_caches, import_caches
from prophetkv_rag.store.disk.upkeep import GcReport, clear, gc

__all__ = [
    "DiskStore",
    "GcReport",
    "TieredStore",
    "Usage",
    "clear",
    "default_disk_bytes",
    "export_caches",
    "free_disk",
    "free_memory",
    "gc",
    "import_caches",
    "must_be_unlocked",
    "nameless",
    "open_disk_store",
    "rekey",
    "usage",
    "writing",
]
