"""RAM over disk over a remote tier: `DiskStore` with a place behind it that several machines may share.

What the disk lacks is read from there, checked as a blob of the disk is, and put on the disk if it is worth its place;
what is written to the disk, or has no room there, is uploaded by a thread. Nothing waits for the remote: indexing and
queries give it `remote_timeout_s`, and one that is slow, down or wrong costs one warning and the time to compute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.store import ChunkCache, DirectoryLock, Lookup, StoreStats, TextEntry, can_write, is_key
from prophetkv_rag.store.catalog import CatalogRow, Ranking
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.remote import Elsewhere, Fetch, Fetches, Found, RemoteFiles, RemoteRecords, RemoteTier, Uploads

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 2.0
_BATCH = 8  # chunks that are asked for together while indexing


class TieredStore(DiskStore):
    """Machines that share a remote need nothing of each other: a chunk of the same model has the same name everywhere.

    Whoever can write to the remote can change answers, and whoever can read it learns what the chunks say.

    Args:
        directory: See `DiskStore`.
        ram_bytes: See `DiskStore`.
        remote: Where the remote tier is.
        remote_max_bytes: Most bytes of blobs there, other machines' included as this one saw them last (it looks every
            five minutes); `None` for no limit. What is worth least goes first.
        remote_timeout_s: Longest that a query waits for the remote, and longest that it may take for one blob before it
            is left alone for a while (15 seconds, then longer).
        remote_options: Arguments of the fsspec file system, such as credentials.
        **settings: See `DiskStore`.

    Raises:
        InputError: If a setting is not allowed, or the URL's file system needs a package that is missing.
        StoreError: If the directory cannot be used.
    """

    remote: RemoteTier
    _elsewhere: Elsewhere | None = None

    def __init__(
        self,
        directory: str | Path,
        ram_bytes: int | None = None,
        *,
        remote: str,
        remote_max_bytes: int | None = None,
        remote_timeout_s: float | None = DEFAULT_TIMEOUT_S,
        remote_options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        timeout_s = DEFAULT_TIMEOUT_S if remote_timeout_s is None else remote_timeout_s
        if not timeout_s > 0:
            msg = f"remote_timeout_s is {timeout_s}; give seconds, more than 0"
            raise InputError(msg)
        if remote_max_bytes is not None and remote_max_bytes < 0:
            msg = f"remote_max_bytes is {remote_max_bytes}; give 0 or more bytes, or None for no limit"
            raise InputError(msg)
        files = RemoteFiles(remote, remote_options)
        super().__init__(directory, ram_bytes, **settings)
        records = RemoteRecords(self.catalog, files.name)
        self.remote = RemoteTier(files, records, self._check_blob, timeout_s=timeout_s, max_bytes=remote_max_bytes)
        self._fetches = Fetches(self.remote, self._keep)
        if self.policy != "read_only":
            ranking = Ranking(settings.get("eviction", "value"))
            lock = DirectoryLock(self.directory / "remote.lock")
            self.remote.uploads = Uploads(
                self.remote, self.catalog, self.files.path, ranking, self.space.flush_uses, lock
            )
            self.space.on_write = self._offer
            self._elsewhere = Elsewhere(self.catalog, self.remote, self.remote.uploads, self.failures)
            self.space.on_failure = self._elsewhere.keep
            records.register()
            if records.num_to_delete():
                self._settle()

    def find(self, key: str, *, fingerprint: str, input_ids: Sequence[int] | None) -> Lookup:
        """See `ChunkStore.find`: from RAM, from disk, else from the remote, if it answers in time."""
        begun, is_on_its_way = self._fetches.expected(key)
        here = super().find(key, fingerprint=fingerprint, input_ids=input_ids)
        if here.cache is not None:
            if self.remote.uploads is not None:
                self.remote.uploads.offer_once(key, fingerprint)
            if is_on_its_way:  # it has come already, and was put there
                self._counters.add(remote_hits=1, ram_hits=-(here.tier == "ram"))
                here = here._replace(tier="remote")
            return here
        if self.files.locked_by is not None:
            return here
        try:
            fetch = self._fetches.begin([key], fingerprint, begun=begun).get(key)
        except StoreError:
            fetch = None
        if fetch is None:
            return here
        found = self._fetches.wait(fetch)
        if found.cache is None or not found.cache.has_ids(input_ids):
            return Lookup(was_corrupt=here.was_corrupt or found.was_bad)
        self._counters.add(hits=1, remote_hits=1, misses=0 if here.was_corrupt else -1)
        return Lookup(found.cache, tier="remote")

    def put(
        self,
        key: str,
        cache: ChunkCache,
        *,
        fingerprint: str,
        entry: TextEntry | None = None,
        if_referenced: bool = False,
    ) -> None:
        """See `DiskStore.put`; it is uploaded afterwards, also if it has no place on the disk."""
        if self.remote.uploads is not None and not if_referenced:
            self.remote.uploads.wait_for_room()
        try:
            super().put(key, cache, fingerprint=fingerprint, entry=entry, if_referenced=if_referenced)
        except StoreError as error:
            if self._elsewhere is None or not self._elsewhere.why_not:
                raise
            msg = f"{error}; nor is it uploaded to {self.remote.files.name}: {self._elsewhere.why_not}"
            raise StoreError(msg) from error
        if self.remote.uploads is not None:
            self.remote.uploads.offer(key, fingerprint)

    def accepts_new(self, waiting: int = 0, *, fingerprint: str | None = None) -> bool:
        """See `ChunkStore.accepts_new`: on the disk, or behind it."""
        is_disk_failing = (
            self._elsewhere is not None
            and self._elsewhere.is_needed
            and not can_write(self.files.incoming, self.space.typical)
        )
        if not is_disk_failing and super().accepts_new(waiting, fingerprint=fingerprint):
            return True
        if self.policy != "eager" or self.remote.uploads is None or self.remote.writes.is_open:
            return False
        if self.files.locked_by is not None or (self.failures.is_failing and not self.catalog.can_write()):
            return False
        if self.remote.max_bytes is None:
            return True
        _, ours, others, _ = self.remote.records.totals()
        coming = len(self.remote.uploads) + waiting + 1
        return ours + others + self.space.typical * coming <= self.remote.max_bytes

    def expect(self, keys: Iterable[str], *, fingerprint: str) -> None:
        """See `ChunkStore.expect`: what is neither in RAM nor on disk is read, all of it at once."""
        self._begin(self._fetches.expect, keys, fingerprint)

    def read_ahead(self, keys: Iterable[str], *, fingerprint: str) -> Future[None] | None:
        """See `ChunkStore.read_ahead`."""
        keys = [key for key in keys if is_key(key)]
        read = super().read_ahead(keys, fingerprint=fingerprint)
        self._begin(self._fetches.begin, keys, fingerprint)
        return read

    def bring(self, chunks: Mapping[str, tuple[Sequence[int], TextEntry | None]], *, fingerprint: str) -> set[str]:
        """See `ChunkStore.bring`; what has no room on the disk is only looked for."""
        here: set[str] = set()
        if self.files.locked_by is not None:
            return here
        remaining = iter(chunks.items())
        while self.policy == "eager" and self.remote.reads.wait_s == 0 and (part := dict(islice(remaining, _BATCH))):
            try:
                with self.catalog.transaction():
                    for key, (input_ids, entry) in part.items():
                        self.catalog.upsert(CatalogRow(key, fingerprint, len(input_ids), 0), entry)
                is_look = not self.space.has_room(len(part), fingerprint=fingerprint)
                fetches = self._fetches.begin(part, fingerprint, is_look=is_look, is_used=False)
            except StoreError as error:
                logger.debug("nothing was brought from the remote tier: %s", error)
                break
            for key, fetch in fetches.items():
                found = self._fetches.wait(fetch)
                if found.is_there and (found.cache is None or found.cache.has_ids(part[key][0])):
                    here.add(key)
        if here:
            self._fetches.flush()  # indexing goes on with what is on the disk
        return here

    def push(self) -> int:
        """Upload, some time soon, all that is on disk and not in the remote; returns how many that is."""
        if self.remote.uploads is None or self.files.locked_by is not None:
            self._must_be_writable("upload caches")
            return 0
        missing = self.remote.records.missing()
        for key, fingerprint in missing:
            self.remote.uploads.offer(key, fingerprint)
        return len(missing)

    def flush(self) -> None:
        """See `ChunkStore.flush`; also waits for the remote, unless it has failed or hangs."""
        super().flush()
        self._fetches.flush()
        super().flush()
        if self.remote.uploads is not None:
            self.remote.uploads.flush()

    def delete(self, keys: Iterable[str]) -> None:
        """See `ChunkStore.delete`; from the remote it is deleted as soon as that answers."""
        super().delete(keys)
        self._settle()

    def drop_references(self, owner: str, keys: Iterable[str]) -> list[str]:
        """See `ChunkStore.drop_references`; from the remote it is deleted as soon as that answers."""
        unreferenced = super().drop_references(owner, keys)
        if unreferenced:
            self._settle()
        return unreferenced

    def drop_from_memory(self, keys: Iterable[str]) -> None:
        """See `DiskStore.drop_from_memory`."""
        keys = list(keys)
        super().drop_from_memory(keys)
        self._fetches.drop(keys)
        if self.remote.uploads is not None:
            self.remote.uploads.drop(keys)

    def stats(self) -> StoreStats:
        """See `ChunkStore.stats`."""
        return replace(super().stats(), remote=self.remote.stats())

    def close(self) -> None:
        """See `ChunkStore.close`; what the remote does not take within its time-out is uploaded another time."""
        super().flush()
        self._fetches.close()
        if self.remote.uploads is not None:
            self.remote.uploads.close(self.remote.timeout_s)
            try:
                self.remote.note_hits()
            except StoreError:
                logger.debug("the hits in the remote tier were not noted", exc_info=True)
        super().close()

    def _begin(self, begin: Callable[[Iterable[str], str], object], keys: Iterable[str], fingerprint: str) -> None:
        """Begin to read what is neither in RAM nor on disk."""
        if self.files.locked_by is not None:
            return
        try:
            begin([key for key in keys if not (self._ram.holds(key) or self.files.path(key).exists())], fingerprint)
        except (StoreError, OSError, ValueError) as error:
            logger.debug("nothing was read ahead from the remote tier: %s", error)

    def _check_blob(self, data: bytes, key: str, fingerprint: str) -> ChunkCache | None:
        """Return the cache that a blob of the remote holds, or `None` for another format; `BlobError` if it is bad."""
        header, cache = self.files.decode(key, data, fingerprint=fingerprint)
        return cache if header.blob_format in ("exact", self.blob_format) else None

    def _keep(self, fetch: Fetch, found: Found) -> bool:
        """Put what was read where the next prompt finds it, if it is a chunk of ours; returns whether it is there."""
        key, fingerprint, cache = fetch.key, fetch.fingerprint, found.cache
        if cache is None:
            return False
        if self.policy == "read_only":
            self._ram.put(key, cache, fingerprint=fingerprint)
            return self._ram.holds(key)
        self._reader.settle(key)  # a bad blob on the disk would keep this one out
        with self.directory_lock.shared():  # nothing is deleted meanwhile
            if key not in self.catalog:
                return False
            self.remote.records.add(key, len(found.data))
            self._ram.put(key, cache, fingerprint=fingerprint)
            row = CatalogRow(key, fingerprint, cache.num_tokens, 0, cache.behind)
            if self.files.path(key).exists() or self.space.write(row, None, found.data, is_used=fetch.is_used):
                return True
        return self._ram.holds(key)

    def _offer(self, row: CatalogRow, data: bytes, is_kept: bool) -> None:
        if self.remote.uploads is not None:
            self.remote.uploads.offer(row.key, row.fingerprint, None if is_kept else data)
        if is_kept and self._elsewhere is not None:
            self._elsewhere.is_needed = False

    def _settle(self) -> None:
        if self.remote.uploads is not None:
            self.remote.uploads.settle()
