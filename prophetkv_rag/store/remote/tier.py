"""The state of one remote tier: whether it answers, what it gave, and the one warning when it does not."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

from prophetkv_rag.errors import StoreError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.store import ChunkCache, RemoteStats
from prophetkv_rag.store.encryption import LockedBlobError
from prophetkv_rag.store.remote.breaker import Breaker
from prophetkv_rag.store.remote.files import RemoteFiles
from prophetkv_rag.store.remote.records import RemoteRecords

logger = logging.getLogger(__name__)

Check: TypeAlias = Callable[[bytes, str, str], ChunkCache | None]
"""Data, key, fingerprint -> the cache, `None` for one of another format; raises `BlobError`."""

_WARN_AGAIN_S = 600.0


class UploadQueue(Protocol):
    """What writes to the remote, as the tier and its upkeep see it; `Uploads`, which needs the tier, is one."""

    def __len__(self) -> int:
        """How many blobs wait to be uploaded."""

    def offer(self, key: str, fingerprint: str, data: bytes | None = None) -> bool:
        """Take a blob to upload; returns whether it was taken."""

    def offer_once(self, key: str, fingerprint: str) -> None:
        """Take a blob that is on disk, unless it was offered before."""

    def drop(self, keys: Iterable[str]) -> None:
        """Do not upload these any more."""

    def settle(self) -> None:
        """Begin to do the deletes that are noted."""

    def wait_for_room(self) -> None:
        """Wait while too much waits that is in memory only."""

    def recount(self) -> None:
        """Look again at what is there."""

    def flush(self) -> bool:
        """Wait until nothing waits, or the remote does not take it; returns whether nothing waits."""

    def close(self, grace_s: float) -> None:
        """End, after at most so many seconds."""


class RemoteTier:
    """What reading from a remote and writing to it share. Safe to use from several threads.

    Reading and writing fail apart: a bucket that may only be read is still read.

    Attributes:
        files: The blobs there.
        records: What the catalog knows of them.
        check: Makes a cache of a blob's bytes.
        timeout_s: Longest that a query waits for it.
        max_bytes: Most bytes of blobs there; `None` for no limit.
        reads, writes: Whether it is asked at all.
        uploads: What writes there; `None` in a store that is opened read-only.
    """

    def __init__(
        self,
        files: RemoteFiles,
        records: RemoteRecords,
        check: Check,
        *,
        timeout_s: float,
        max_bytes: int | None = None,
    ) -> None:
        self.files = files
        self.records = records
        self.check = check
        self.uploads: UploadQueue | None = None
        self.timeout_s = timeout_s
        self.max_bytes = max_bytes
        self.reads = Breaker()
        self.writes = Breaker()
        self._lock = threading.Lock()
        self._warned_at: float | None = None
        self._has_warned_of_bad = False
        self._unusable: set[str] = set()
        self._locked: set[str] = set()
        self._begin_anew()
        around_fork(self, "_lock", in_child=RemoteTier._begin_anew)

    def _begin_anew(self) -> None:
        """Count from 0: what a child has inherited, its parent counts."""
        self._counts = {"hits": 0, "misses": 0, "bad": 0, "failures": 0, "uploads": 0, "deletes": 0}
        self._noted_hits = 0

    def count(self, name: str) -> None:
        """Count a hit, miss, bad blob, failure, upload or delete."""
        with self._lock:
            self._counts[name] += 1

    def failed(self, breaker: Breaker, error: Exception) -> None:
        """Leave it alone for a while; the first time, and then every ten minutes at most, this is a warning."""
        self.count("failures")
        if not breaker.failed():
            logger.debug("the remote tier %s failed again: %s", self.files.name, error)
            return
        with self._lock:
            now = time.monotonic()
            is_news = self._warned_at is None or now - self._warned_at > _WARN_AGAIN_S
            self._warned_at = now if is_news else self._warned_at
        level = logging.WARNING if is_news else logging.DEBUG
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        logger.log(
            level,
            "the remote tier %s cannot be used (%s): chunk caches are computed instead, and it is tried again later",
            self.files.name,
            what,
        )

    def answered(self, breaker: Breaker) -> None:
        """Note that it did what was asked."""
        if breaker.succeeded():
            logger.info("the remote tier %s answers again", self.files.name)

    def found_bad(self, key: str, reason: Exception) -> None:
        """A blob there is not what it should be: it is not asked for again until it has been written anew."""
        self.count("bad")
        with self._lock:
            is_first, self._has_warned_of_bad = not self._has_warned_of_bad, True
            self._unusable.add(key)
            if isinstance(reason, LockedBlobError):
                self._locked.add(key)
        logger.log(
            logging.WARNING if is_first else logging.DEBUG,
            "the chunk cache %s in the remote tier %s cannot be used and is computed again: %s",
            key,
            self.files.name,
            reason,
        )

    def set_usable(self, key: str, is_usable: bool) -> None:
        """Say whether what is there under a key may be used by this store."""
        with self._lock:
            (self._unusable.discard if is_usable else self._unusable.add)(key)
            self._locked.discard(key)

    def is_usable(self, key: str) -> bool:
        """Whether nothing speaks against what is there under a key."""
        with self._lock:
            return key not in self._unusable

    def is_locked(self, key: str) -> bool:
        """Whether what is there under a key is encrypted, and this store has no key."""
        with self._lock:
            return key in self._locked

    def note_hits(self) -> None:
        """Write the hits so far to the catalog."""
        with self._lock:
            hits, self._noted_hits = self._counts["hits"] - self._noted_hits, self._counts["hits"]
        if hits:
            self.records.count_hits(hits)

    def stats(self) -> RemoteStats:
        """Return counts since the store was opened, and what the catalog knows to be there."""
        waiting = 0 if self.uploads is None else len(self.uploads)
        try:
            chunks, nbytes, others, hits = self.records.totals()
            waiting += self.records.num_to_delete()
        except StoreError:  # opened read-only, and of an older version
            chunks = nbytes = others = hits = 0
        with self._lock:
            counts = dict(self._counts)
            all_hits = hits + counts["hits"] - self._noted_hits
        is_answering = not (self.reads.is_open or self.writes.is_open)
        return RemoteStats(
            self.files.name, chunks, nbytes, others, self.max_bytes, all_hits, waiting, is_answering, **counts
        )
