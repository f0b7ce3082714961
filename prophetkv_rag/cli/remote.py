"""`prophetkv-rag cache push`, and what other commands do before they leave a remote tier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from prophetkv_rag.cli.cache import DatabaseOption, JsonOption, open_caches
from prophetkv_rag.cli.console import print_json, progress_console, results, status
from prophetkv_rag.cli.database import DEFAULT_DATABASE
from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.store.base import ChunkStore
    from prophetkv_rag.store.disk import DiskStore


def push(db: DatabaseOption = DEFAULT_DATABASE, as_json: JsonOption = False) -> None:
    """Upload the caches that the remote tier lacks, without loading the model.

    Exit status: 0 if it has them all, 1 if some are still waiting because it does not answer.

    Caches are uploaded while indexing and answering; this is for what an interruption or an outage has left.
    """
    store = open_caches(db)
    try:
        if store.remote is None:
            msg = f"the database at {db} has no remote tier; give it one with: prophetkv-rag index DIR --remote URL"
            raise InputError(msg)
        report = push_caches(store)
        left = store.stats().remote
    finally:
        store.close()
    assert left is not None
    if as_json:
        print_json({**report, "chunks": left.chunks, "nbytes": left.nbytes})
    else:
        results().print(
            f"{report['uploaded']} caches uploaded, {report['not_uploaded']} still waiting; {left.chunks} are in "
            f"{left.url}, {left.nbytes / 1e6:,.1f} MB",
            markup=False,
        )
    if report["not_uploaded"]:
        raise typer.Exit(1)


def other_remotes(store: DiskStore, give_up_url: str | None) -> dict[str, int]:
    """Return the remote tiers that a store had once, and the deletes that wait for each; one of them may be given up.

    Raises:
        InputError: If that is none of them.
    """
    from prophetkv_rag.store.remote_records import give_up, others

    url = None if store.remote is None else store.remote.records.url
    found = others(store.catalog, url)
    if give_up_url is not None:
        if give_up_url not in found:
            known = ", ".join(found) or "there is none"
            msg = f"{give_up_url!r} is no remote tier that these caches had and do not have any more; known: {known}"
            raise InputError(msg)
        give_up(store.catalog, give_up_url)
        del found[give_up_url]
    return found


def push_caches(store: ChunkStore) -> dict[str, int]:
    """Upload what a store's remote tier lacks and wait for it; returns what became of it, nothing without a remote."""
    from prophetkv_rag.store.tiered import TieredStore

    if not isinstance(store, TieredStore):
        return {}
    before = store.remote.stats().uploads
    with status("uploading caches"):
        store.push()
        store.flush()
    after = store.remote.stats()
    return {"uploaded": after.uploads - before, "not_uploaded": after.waiting}


def finish_uploads(store: ChunkStore) -> None:
    """Wait for the uploads of an index run, and say so if the remote does not take them."""
    remote = store.stats().remote
    if remote is None:
        return
    with status("uploading caches"):
        store.flush()
    remote = store.stats().remote
    if remote is not None and remote.waiting:
        progress_console().print(
            f"{remote.waiting} caches are not in {remote.url} yet; `prophetkv-rag cache push` uploads them",
            markup=False,
            soft_wrap=True,
        )
