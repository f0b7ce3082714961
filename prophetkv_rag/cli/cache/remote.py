"""`prophetkv-rag cache push`, and what other commands do before they leave a remote tier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from prophetkv_rag.cli.cache.opened import DatabaseOption, JsonOption, open_caches
from prophetkv_rag.cli.console import print_json, progress_console, results, status
from prophetkv_rag.cli.database_settings import DEFAULT_DATABASE
from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.store import ChunkStore


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


def push_caches(store: ChunkStore) -> dict[str, int]:
    """Upload what a store's remote tier lacks and wait for it; returns what became of it, nothing without a remote."""
    from prophetkv_rag.store.disk import TieredStore

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
