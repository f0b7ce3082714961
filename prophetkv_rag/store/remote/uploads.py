"""Writing to the remote tier, off everybody's path: one thread that deletes what is to be deleted, then uploads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from prophetkv_rag.errors import BlobError, StoreError
from prophetkv_rag.forks import Order, around_fork
from prophetkv_rag.store import DirectoryLock
from prophetkv_rag.store.catalog import Catalog, Ranking
from prophetkv_rag.store.encryption import MAGIC, is_sealed
from prophetkv_rag.store.remote.tier import RemoteTier

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 256 << 20
"""Blobs that are not on disk and wait to be uploaded; what comes when they are more is computed again some day."""
RECOUNT_S = 300.0
"""A remote with a limit is listed again after this time, since other machines write there too."""
_HANGS = 30.0  # times the time-out: nobody waits for a call that takes longer


class Uploads:
    """What waits is in memory only, and survives nothing: the catalog says what is not there yet (`push`).

    Args:
        tier: The remote.
        catalog: Says what is still wanted.
        path_of: Where a key's blob is on disk.
        ranking: What goes first where there is a limit.
        note_uses: Called before chunks are ranked.
        lock: Held during each write, so that the processes on a directory keep to one limit, and none deletes what
            another has just uploaded again.
    """

    def __init__(
        self,
        tier: RemoteTier,
        catalog: Catalog,
        path_of: Callable[[str], Path],
        ranking: Ranking,
        note_uses: Callable[[], None],
        lock: DirectoryLock,
    ) -> None:
        self._tier = tier
        self._catalog = catalog
        self._path_of = path_of
        self._ranking = ranking
        self._note_uses = note_uses
        self._lock = lock
        self._mutex = threading.RLock()
        self._seen: set[str] = set()
        self._refused: set[str] = set()
        self._is_closed = False
        self._begin_anew()
        around_fork(self, "_mutex", order=Order.QUEUE, in_child=Uploads._begin_anew)

    def _begin_anew(self) -> None:
        """Begin with nothing waiting: in a child, the parent's thread uploads what waited."""
        self._changed = threading.Condition(self._mutex)
        self._waiting: dict[str, tuple[str, bytes | None]] = {}
        self._nbytes = 0
        self._has_deletes = False
        self._busy_since: float | None = None
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, key: str, fingerprint: str, data: bytes | None = None) -> bool:
        """Upload a blob some time soon, if it is not there yet; without `data` it is read from the disk then.

        Returns:
            Whether it waits now; not if too much does already.
        """
        with self._changed:
            self._seen.add(key)
            waiting = self._waiting.get(key)
            if self._is_closed or (waiting is not None and (data is None or waiting[1] is not None)):
                return not self._is_closed
            if data is not None:
                if self._nbytes + len(data) > MAX_WAITING_BYTES:
                    return False
                self._nbytes += len(data)
            self._waiting[key] = (fingerprint, data)
            self._wake()
            return True

    def offer_once(self, key: str, fingerprint: str) -> None:
        """As `offer`, unless this process has offered it before: for what is met on the way of a query."""
        if key not in self._seen:
            self.offer(key, fingerprint)

    def settle(self) -> None:
        """Do the deletes that the catalog has noted, some time soon."""
        with self._changed:
            self._has_deletes = not self._is_closed
            self._wake()

    def drop(self, keys: Iterable[str]) -> None:
        """Do not upload these."""
        with self._changed:
            for key in keys:
                self._take(key)
                self._seen.discard(key)

    def wait_for_room(self) -> None:
        """Wait while too much waits that is in memory only; not if the remote does not answer. For indexing."""
        self._wait(lambda: self._nbytes <= MAX_WAITING_BYTES // 2)

    def flush(self) -> bool:
        """Wait until everything is done, or the remote has failed, or hangs; returns whether all is done."""
        return self._wait(lambda: not self._has_work)

    def close(self, grace_s: float) -> None:
        """End the thread; what takes longer than `grace_s` is left for the next time."""
        self._wait(lambda: not self._has_work, grace_s)
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._has_deletes = False
            self._changed.notify_all()
        if self._thread is not None and self._busy_since is None:
            self._thread.join(grace_s)

    def recount(self) -> None:
        """List the remote, and note in the catalog what is there."""
        with self._lock.exclusive():  # nothing of ours is being written
            _count(self._tier)

    @property
    def _has_work(self) -> bool:
        return bool(self._waiting or self._has_deletes or self._busy_since is not None)

    def _wait(self, is_done: Callable[[], bool], longest_s: float | None = None) -> bool:
        deadline = None if longest_s is None else time.monotonic() + longest_s
        hangs_s = _HANGS * self._tier.timeout_s
        with self._changed:
            while not is_done():
                now = time.monotonic()
                busy = self._busy_since
                if busy is None and self._tier.writes.is_open:
                    return False
                if (busy is not None and now - busy > hangs_s) or (deadline is not None and now > deadline):
                    return False
                self._changed.wait(0.05)
            return True

    def _wake(self) -> None:
        if self._thread is None:  # a daemon: a remote that hangs must not keep the process from ending
            self._thread = threading.Thread(target=self._work, name="prophetkv-upload", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _take(self, key: str) -> tuple[str, bytes | None] | None:
        found = self._waiting.pop(key, None)
        self._nbytes -= len(found[1]) if found and found[1] is not None else 0
        return found

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and not (self._has_deletes or self._waiting):
                    self._changed.wait()
                if self._is_closed:
                    return
                if not self._tier.writes.allows():
                    self._changed.wait(min(1.0, self._tier.writes.wait_s) + 0.01)
                    continue
                self._busy_since = time.monotonic()
                must_delete, self._has_deletes = self._has_deletes, False
                key = None if must_delete else next(iter(self._waiting))
                fingerprint, data = self._waiting[key] if key is not None else ("", None)
            try:
                with self._lock.exclusive():
                    self._settle()
                    if key is not None:
                        self._upload(key, fingerprint, data)
                self._tier.answered(self._tier.writes)
            except StoreError as error:  # the catalog's fault, or the store was closed meanwhile
                logger.debug("nothing was written to the remote tier: %s", error)
            except Exception as error:  # whatever a file system raises
                self._tier.failed(self._tier.writes, error)
                with self._changed:
                    self._has_deletes = self._has_deletes or must_delete
                key = None  # it stays for the next time
            with self._changed:
                if key is not None:
                    self._take(key)
                self._busy_since = None
                self._changed.notify_all()

    def _settle(self) -> None:
        """Delete what was deleted; whatever is uploaded afterwards was wanted again."""
        records = self._tier.records
        while doomed := records.to_delete():
            for fingerprint, key in doomed:
                self._tier.files.remove(fingerprint, key)
                records.deleted(fingerprint, key)
                self._tier.count("deletes")
                self._busy_since = time.monotonic()

    def _upload(self, key: str, fingerprint: str, data: bytes | None) -> None:
        tier, records = self._tier, self._tier.records
        if key not in self._catalog or (tier.is_usable(key) and records.has(key)):
            return
        try:
            data = self._path_of(key).read_bytes() if data is None else data
            tier.check(data, key, fingerprint)
        except (OSError, BlobError):
            return
        size = tier.files.size(fingerprint, key) if tier.is_usable(key) else None
        if size != len(data):
            is_other = size is not None and not is_sealed(data)
            if tier.is_locked(key) or (is_other and is_sealed(tier.files.start(fingerprint, key, len(MAGIC)))):
                self._refused.add(key)  # a machine with a key has put it there: nothing is put in clear over that
                return
            records.remove([key])  # it is not there as it should be
            if not self._make_room(key, len(data)):
                self._refused.add(key)
                return
            tier.files.write(fingerprint, key, data)
            tier.count("uploads")
        tier.set_usable(key, True)
        if not records.add(key, len(data)):  # deleted while it was on its way
            records.doom(fingerprint, key)
            self._settle()

    def _make_room(self, key: str, nbytes: int) -> bool:
        tier, records = self._tier, self._tier.records
        if tier.max_bytes is None:
            return True
        if nbytes > tier.max_bytes:
            return False
        if abs(time.time() - records.counted_at()) > RECOUNT_S:
            _count(tier)
            with self._changed:  # what had no room may have become worth it, and is offered again when it is next used
                self._seen -= self._refused
                self._refused.clear()
        _, ours, others, _ = records.totals()
        needed = ours + others + nbytes - tier.max_bytes
        if needed <= 0:
            return True
        self._note_uses()
        victims = records.victims(
            self._ranking, key, nbytes=nbytes, needed=needed, wanted=max(needed, tier.max_bytes // 50)
        )
        for victim, fingerprint in victims or ():
            tier.files.remove(fingerprint, victim)
            records.remove([victim])
            with self._changed:
                self._seen.discard(victim)
        return victims is not None


def _count(tier: RemoteTier) -> None:
    sizes: dict[str, int] = {}
    others = 0
    for blob in tier.files.blobs():
        if blob.key:
            sizes[blob.key] = blob.nbytes
        else:
            others += blob.nbytes
    tier.records.recount(sizes, others)
