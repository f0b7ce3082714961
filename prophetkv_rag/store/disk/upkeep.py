"""Looking after a store on disk: `verify`, `gc` and `clear`. They may run while other processes index and answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store import VerifyReport
from prophetkv_rag.store.catalog import CatalogRow, damaged
from prophetkv_rag.store.disk.cataloged import CatalogedStore
from prophetkv_rag.store.disk.key_mark import must_be_unlocked, write_mark
from prophetkv_rag.store.disk.leases import writing
from prophetkv_rag.store.disk.rebuild import rebuild, sweep
from prophetkv_rag.store.remote import (
    RemoteCheck,
    RemoteCollection,
    check_remote,
    collect_remote,
    doom_whole,
    settle_remote,
)

GRACE_S = 3600.0
"""Default age before what nobody refers to is collected: longer than any write of a chunk and its record takes."""
Live = Mapping[str, Collection[str]] | Callable[[], Mapping[str, Collection[str]]]
"""Owner -> keys that its records carry."""
_SLICE = 200  # chunks handled while others wait
_CLOCK_SLACK_S = 60.0


@dataclass(frozen=True, slots=True)
class GcReport:
    """What was collected.

    Attributes:
        orphans: Files that the catalog does not know.
        unreferenced: Chunks that nobody refers to.
        stale_references: References to chunks that their collection does not have any more.
        freed_bytes: Bytes of all blobs and files removed.
        remote_deleted: Blobs deleted from the remote tier, also those that it could not be asked to delete before.
        remote_waiting: Those still to be deleted there, when it answers.
        remote_orphans: Files there that a crash left half written.
    """

    orphans: int = 0
    unreferenced: int = 0
    stale_references: int = 0
    freed_bytes: int = 0
    remote_deleted: int = 0
    remote_waiting: int = 0
    remote_orphans: int = 0


def verify(store: CatalogedStore, *, repair: bool = False) -> VerifyReport:
    """Read and check every blob, and the catalog.

    `orphans` are blobs that the catalog does not know (their keys) and other files, such as what a killed process left
    half written (their names). A remote tier's blobs are read and checked too, as far as the catalog knows them. With
    `repair`, a damaged catalog is made again from the blobs, and bad blobs and orphans
    are deleted. The chunks of bad and missing blobs stay recognised in prompts, and are computed again when needed.

    Raises:
        InputError: If the caches are encrypted with a key that the store was not given.
    """
    must_be_unlocked(store.files)
    damage = store.catalog.check()
    if damage and repair:
        with store.directory_lock.exclusive():
            store.catalog.renew()
            rebuild(store.catalog, store.files)
            if store.remote is not None:
                store.remote.records.register()
    rows = store.catalog.rows()
    faults = [(row, fault) for row in rows if (fault := _fault(store, row)) is not None]
    with store.directory_lock.exclusive():  # nothing is being written now
        now = {row.key: row for row in store.catalog.rows()}  # what was evicted or deleted meanwhile is not missing
        suspects = [now[row.key] for row, _ in faults if row.key in now]
        faults = [(row, fault) for row in suspects if (fault := _fault(store, row)) is not None]
        known = set(now)
        orphans = [path for path in store.files.all_files() if store.files.key_of(path) not in known]
        if repair:
            lost = [row.key for row, _ in faults]
            store.drop_from_memory(lost)
            for row, fault in faults:
                if fault == "bad":
                    store.files.path(row.key).unlink(missing_ok=True)
            store.catalog.mark_lost(lost)
            for path in orphans:
                path.unlink(missing_ok=True)
    known_keys = {row.key: row.fingerprint for row in rows}
    remote = RemoteCheck() if store.remote is None else check_remote(store.remote, known_keys, repair=repair)
    return VerifyReport(
        checked=len(rows),
        bad=tuple(row.key for row, fault in faults if fault == "bad"),
        missing=tuple(row.key for row, fault in faults if fault == "missing"),
        orphans=tuple(store.files.key_of(path) or path.name for path in orphans),
        repaired=repair,
        catalog=damage,
        remote_checked=remote.checked,
        remote_bad=remote.bad,
        remote_missing=remote.missing,
        remote_error=remote.error,
    )


def gc(store: CatalogedStore, live: Live | None = None, *, grace_s: float = GRACE_S) -> GcReport:
    """Collect what belongs to nothing: files that a crash left, and chunks that nobody refers to.

    Others go on meanwhile: they wait for a few chunks' deletion at most. What a query is loading is left alone.

    Args:
        store: Opened for writing.
        live: For every owner that there is, the keys its records carry, or a function that reads that now (see
            `chroma.live_references`). References of other owners, and to other keys, are dropped first, but not
            those of `"engine"` and of owners with a colon in their name, which are no collections. `None` to believe
            the references as they are. With a function, what is being written is left alone whatever the clock says.
        grace_s: What was noted less long ago is left alone, as its record may be being written.
    """
    orphans = freed = 0
    with store.directory_lock.exclusive():
        sweep(store.catalog, store.files)
        known = {row.key for row in store.catalog.rows()}
        for path in store.files.all_files():
            if store.files.key_of(path) not in known:
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
                orphans += 1
    _restamp(store)
    before = time.time() - grace_s
    dropped = 0 if live is None else _drop_stale(store, live, before)
    unreferenced = 0
    for keys in _slices(_unreferenced(store, before)):
        with store.directory_lock.exclusive(), store.catalog.transaction() as run:
            leased = store.leases.held()
            still = set(_unreferenced(store, before))
            doomed = [key for key in keys if key in still and key not in leased]
            for key in doomed:
                path = store.files.path(key)
                freed += path.stat().st_size if path.exists() else 0
            _, traced = store.catalog.delete(run, doomed)
            store.files.remove([*doomed, *traced])
            unreferenced += len(doomed)
        store.drop_from_memory([*doomed, *traced])  # when no query sees the chunks any more
    remote = RemoteCollection() if store.remote is None else collect_remote(store.remote, grace_s)
    return GcReport(
        orphans, unreferenced, dropped, freed, remote.deleted, remote.waiting, remote_orphans=remote.orphans
    )


def clear(store: CatalogedStore, namespace: str | None = None) -> int:
    """Delete everything, or everything of one namespace: blobs, catalog rows, references and what is held in RAM.

    From a remote tier, all that anybody has uploaded for the same models and namespaces is deleted, now or as soon as
    it answers.

    Returns:
        How many chunks were deleted.
    """
    with store.directory_lock.exclusive(), store.catalog.transaction() as run:
        others = [
            fingerprint
            for fingerprint, found in run.execute("SELECT fingerprint, namespace FROM identities")
            if namespace is not None and found != namespace
        ]
        named = {fingerprint for (fingerprint,) in run.execute("SELECT fingerprint FROM identities")}
        keys = [
            key
            for key, fingerprint in run.execute("SELECT key, fingerprint FROM chunks")
            # What no engine of this version has described yet has no namespace.
            if fingerprint not in others and (not namespace or fingerprint in named)
        ]
        _, traced = store.catalog.delete(run, keys)
        store.files.remove([*keys, *traced])
        doom_whole(run, named.difference(others))
        if namespace is None:
            write_mark(store.directory, None)  # any key may follow
            damaged(store.directory / "catalog.sqlite").unlink(missing_ok=True)
    store.drop_from_memory([*keys, *traced])  # when no query sees the chunks any more
    store.catalog.scrub()
    if store.remote is not None:
        settle_remote(store.remote)
    return len(keys)


def _fault(store: CatalogedStore, row: CatalogRow) -> str | None:
    try:
        store.files.read(row.key, fingerprint=row.fingerprint)
    except FileNotFoundError:
        return "missing" if row.nbytes else None
    except (BlobError, OSError):
        return "bad"
    return None


def _restamp(store: CatalogedStore) -> None:
    """What was noted in the future was noted by a clock that has been put back; its age counts from now."""
    now = time.time()
    with store.catalog.transaction() as run:
        for table in ("chunks", "refs"):
            run.execute(f"UPDATE {table} SET noted_at = ? WHERE noted_at > ?", (now, now + _CLOCK_SLACK_S))


def _drop_stale(store: CatalogedStore, live: Live, before: float) -> int:
    """Drop references that no record bears out; the chunks stay, for the next step to collect.

    Records get references that were lost: with the catalog, or to a disk that was full when they were written.
    """
    # In this order: whoever wrote one of these references still writes, or has written the record that is read next.
    with store.catalog.transaction(is_write=False) as run:
        found = list(run.execute("SELECT owner, key FROM refs WHERE noted_at <= ?", (before,)))
    leased = store.leases.held()
    wanted = {owner: set(keys) for owner, keys in (live() if callable(live) else live).items()}
    stale = [
        (owner, key)
        for owner, key in found
        if key not in wanted.get(owner, ()) and _is_collection(owner) and writing(owner) not in leased
    ]
    with store.catalog.transaction() as run:
        known = {key for (key,) in run.execute("SELECT key FROM chunks")}
        for owner, keys in wanted.items():
            store.catalog.add_references(owner, (keys & known).difference(store.catalog.references(owner)))
        run.executemany("DELETE FROM refs WHERE owner = ? AND key = ?", stale)
    return len(stale)


def _is_collection(owner: str) -> bool:
    return owner != "engine" and ":" not in owner


def _unreferenced(store: CatalogedStore, before: float) -> list[str]:
    with store.catalog.transaction(is_write=False) as run:
        found = run.execute(
            "SELECT key FROM chunks WHERE noted_at <= ? AND key NOT IN (SELECT key FROM refs)", (before,)
        )
        return [key for (key,) in found]


def _slices(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), _SLICE):
        yield keys[start : start + _SLICE]
