"""`prophetkv-rag cache verify|gc|clear`: the caches of a database checked, tidied and deleted."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prophetkv_rag.cli.cache.opened import DatabaseOption, JsonOption, open_caches
from prophetkv_rag.cli.console import print_json, results, status
from prophetkv_rag.cli.database import open_chroma
from prophetkv_rag.cli.database_settings import DEFAULT_DATABASE
from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.store import VerifyReport
    from prophetkv_rag.store.disk import DiskStore, GcReport


def verify(
    db: DatabaseOption = DEFAULT_DATABASE,
    repair: Annotated[bool, typer.Option("--repair", help="Delete what is bad or belongs to nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read and check every cached chunk, and the catalog.

    Exit status: 0 if all is well or was repaired, 1 if something was found. Bad caches are never used: a chunk without
    a good one is computed again when it is next needed.
    """
    store = open_caches(db)
    with status("checking every cache"):
        report = store.verify(repair=repair)
    store.close()
    if as_json:
        print_json(_shown(report, store))
    else:
        console = results()
        for title, keys in (
            ("bad", report.bad),
            ("missing", report.missing),
            ("orphan", report.orphans),
            ("bad in the remote tier", report.remote_bad),
            ("missing in the remote tier", report.remote_missing),
        ):
            for key in keys:
                console.print(f"{title:>9}  {key}", markup=False)
        for title, what in (("catalog", report.catalog), ("the remote tier cannot be read", report.remote_error)):
            if what:
                console.print(f"{title:>9}  {what}", markup=False)
        if store.remote is not None:
            console.print(f"{report.remote_checked} caches checked in {store.remote.files.name}", markup=False)
        ending = "" if not report.num_faults else ": repaired" if repair else "; --repair deletes them"
        console.print(f"{report.checked} caches checked, {report.num_faults} faults found{ending}", markup=False)
    if report.remote_error or (report.num_faults and not repair):
        raise typer.Exit(1)


def gc(
    db: DatabaseOption = DEFAULT_DATABASE,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds: what was written less long ago is left alone.")
    ] = 3600.0,
    give_up_remote: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A remote tier that is gone for good: nothing is noted for it any more."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Delete the caches that no record of the database's collections refers to, and what a crash left.

    May run while others index and ask.
    """
    from prophetkv_rag.chroma import live_references
    from prophetkv_rag.cli.cache.other_remotes import other_remotes
    from prophetkv_rag.store.disk import gc as collect

    store = open_caches(db, needs_key=False)
    others = other_remotes(store, give_up_remote)
    with status("looking for caches that belong to nothing"):
        client, _ = open_chroma(db.resolve())
        report = collect(store, partial(live_references, client), grace_s=grace)
    store.close()
    if as_json:
        print_json(_shown(report, store) | ({"other_remotes": others} if others else {}))
        return
    results().print(
        f"{report.unreferenced} caches and {report.orphans} stray files deleted, {report.freed_bytes / 1e6:,.1f} MB; "
        f"{report.stale_references} references to records that are gone",
        markup=False,
    )
    if store.remote is not None:
        results().print(
            f"{report.remote_deleted} caches and {report.remote_orphans} half-written files deleted in "
            f"{store.remote.files.name}; {report.remote_waiting} deletes are still waiting for it",
            markup=False,
        )
    for url, waiting in others.items():
        results().print(
            f"{waiting} deletes wait for {url}, which the database had once; --give-up-remote {url} forgets them",
            markup=False,
            soft_wrap=True,
        )


def clear(
    db: DatabaseOption = DEFAULT_DATABASE,
    namespace: Annotated[str | None, typer.Option(help="Delete the caches of this namespace only.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete all caches.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete caches for good. The documents and their embeddings stay; `cache warm` computes the caches again."""
    if (namespace is None) != everything:
        msg = "say what to delete: either --namespace NAME or --all"
        raise InputError(msg)
    from prophetkv_rag.store.disk import clear as delete
    from prophetkv_rag.store.disk import nameless

    store = open_caches(db, needs_key=False)
    deleted = delete(store, namespace)
    left, unknown = store.stats(), nameless(store)
    store.close()
    waiting = {} if left.remote is None else {"remote_waiting": left.remote.waiting}
    if unknown and namespace:
        waiting["of_unknown_namespace"] = unknown
    if as_json:
        print_json({"deleted": deleted, "chunks_left": left.chunks, "nbytes_left": left.nbytes, **waiting})
        return
    results().print(f"{deleted} caches deleted; {left.chunks} are left, {left.nbytes / 1e6:,.1f} MB", markup=False)
    if left.remote is not None and left.remote.waiting:
        results().print(f"{left.remote.url} has not answered; `cache gc` deletes them there when it does", markup=False)
    if unknown and namespace:
        results().print(
            f"{unknown} caches may be of this namespace too: an early version wrote them, and the catalog was made "
            "anew since; open the namespace's own engine here once and clear again, or clear with --all",
            markup=False,
        )


def _shown(report: VerifyReport | GcReport, store: DiskStore) -> dict[str, Any]:
    """A report as JSON; without a remote tier it says nothing of one."""
    values = asdict(report)
    return {name: value for name, value in values.items() if store.remote or not name.startswith("remote_")}
