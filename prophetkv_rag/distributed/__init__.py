"""Bulk indexing on several processes or machines: chunks are encoded by Ray actors, each with a model of its own.

In come documents (texts of chunks, in order); out come their caches, in a place that all workers and the caller reach:
the remote tier, or on one machine the store's own directory. Ray carries texts and counts, never caches. Begin reading
with `encoding.py` (what is sent out, and in which order: `schedule.py`); `worker.py` is what runs in an actor, made
from `settings.py`, `pool.py` keeps them at work and replaces those that die, `cluster.py` finds or starts Ray,
`meeting.py` proves that all write to one place, and `build.py` is all of it in one call. Needs the extra `ray`;
importing this package loads neither Ray nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prophetkv_rag.lazy import lazily

if TYPE_CHECKING:
    from prophetkv_rag.distributed.build import BuildReport, build_caches
    from prophetkv_rag.distributed.cluster import Cluster, check_address, connect
    from prophetkv_rag.distributed.encoding import Documents, Totals, encode_documents
    from prophetkv_rag.distributed.meeting import left_for_workers
    from prophetkv_rag.distributed.pool import WorkerPool
    from prophetkv_rag.distributed.settings import WorkerSettings
    from prophetkv_rag.distributed.worker import ChunkWorker

_HOME = {
    name: f"prophetkv_rag.distributed.{module}"
    for module, names in {
        "build": ("BuildReport", "build_caches"),
        "cluster": ("Cluster", "check_address", "connect"),
        "encoding": ("Documents", "Totals", "encode_documents"),
        "meeting": ("left_for_workers",),
        "pool": ("WorkerPool",),
        "settings": ("WorkerSettings",),
        "worker": ("ChunkWorker",),
    }.items()
    for name in names
}

__all__ = [
    "BuildReport",
    "ChunkWorker",
    "Cluster",
    "Documents",
    "Totals",
    "WorkerPool",
    "WorkerSettings",
    "build_caches",
    "check_address",
    "connect",
    "encode_documents",
    "left_for_workers",
]

__getattr__, __dir__ = lazily(__name__, _HOME)
