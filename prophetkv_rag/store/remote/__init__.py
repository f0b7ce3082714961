"""The tier behind the disk: blobs in a place that several machines share, reached by fsspec.

In come keys that the disk lacks and blobs that it has written; out come checked caches, in time or not at all. Nobody
waits for it beyond a time-out, and a remote that fails is left alone for a while. Begin reading with `tier.py`, then
`fetches.py` (reading) and `uploads.py` (writing); `records.py` is what the catalog knows of it.
"""

from prophetkv_rag.store.remote.elsewhere import Elsewhere
from prophetkv_rag.store.remote.fetches import Fetch, Fetches, Found
from prophetkv_rag.store.remote.files import RemoteFiles
from prophetkv_rag.store.remote.records import RemoteRecords, doom_all, doom_whole, give_up, others
from prophetkv_rag.store.remote.tier import RemoteTier
from prophetkv_rag.store.remote.upkeep import RemoteCheck, RemoteCollection, check_remote, collect_remote, settle_remote
from prophetkv_rag.store.remote.uploads import Uploads

__all__ = [
    "Elsewhere",
    "Fetch",
    "Fetches",
    "Found",
    "RemoteCheck",
    "RemoteCollection",
    "RemoteFiles",
    "RemoteRecords",
    "RemoteTier",
    "Uploads",
    "check_remote",
    "collect_remote",
    "doom_all",
    "doom_whole",
    "give_up",
    "others",
    "settle_remote",
]
