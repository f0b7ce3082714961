"""`prophetkv-rag cache stats|verify|gc|clear|new-key`: the chunk caches of a database, without loading its model."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prophetkv_rag.cli.console import print_json, results, status
from prophetkv_rag.cli.database import BLOB_DIRECTORY, DEFAULT_DATABASE, open_chroma, require_settings
from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.store.base import VerifyReport
    from prophetkv_rag.store.disk import DiskStore
    from prophetkv_rag.store.statistics import Usage
    from prophetkv_rag.store.upkeep import GcReport

app = typer.Typer(help="Look at, check and move the KV caches of a database.", no_args_is_help=True)

DatabaseOption = Annotated[Path, typer.Option("--db", help="Database directory, made by `prophetkv-rag index`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.command()
def stats(db: DatabaseOption = DEFAULT_DATABASE, as_json: JsonOption = False) -> None:
    """Say what is cached, per collection and model, how much it is used, and what is still to be computed."""
    from prophetkv_rag.store.statistics import all_counts, hits_by_tier, usage

    store = open_caches(db, needs_key=False)
    values = asdict(store.stats())
    rows, limits, counts = usage(store), store.limits, all_counts(store.catalog)
    hits = hits_by_tier(counts)
    store.close()
    shown = {key: values[key] for key in ("chunks", "tokens", "nbytes", "location")}
    remote = values["remote"]
    if as_json:
        behind = {} if remote is None else {"remote": remote}
        print_json(
            {
                **shown,
                "limit": limits.all_bytes,
                "namespace_limit": limits.namespace_bytes,
                **behind,
                "counts": counts,
                "hits_by_tier": hits,
                "usage": [asdict(row) for row in rows],
            }
        )
        return
    mean = shown["nbytes"] / shown["tokens"] if shown["tokens"] else 0
    of_limit = "" if limits.all_bytes is None else f" of {limits.all_bytes / 1e6:,.1f} MB"
    results().print(
        f"{shown['chunks']} chunks, {shown['tokens']:,} tokens, {shown['nbytes'] / 1e6:,.1f} MB{of_limit} "
        f"({mean / 1e3:.1f} kB a token) in {shown['location']}",
        markup=False,
    )
    if remote is not None:
        of_limit = "" if remote["max_bytes"] is None else f" of {remote['max_bytes'] / 1e6:,.1f} MB"
        results().print(
            f"{remote['chunks']} of them in {remote['url']}, {remote['nbytes'] / 1e6:,.1f} MB{of_limit}; "
            f"{remote['all_hits']} caches read from there, {remote['other_bytes'] / 1e6:,.1f} MB of others; "
            f"{remote['waiting']} uploads and deletes waiting",
            markup=False,
        )
    if limits.namespace_bytes is not None:
        results().print(f"{limits.namespace_bytes / 1e6:,.1f} MB at most of each namespace", markup=False)
    found = f"{hits['ram']:,} in RAM, {hits['disk']:,} on disk"
    found += f", {hits['remote']:,} in the remote tier" if remote is not None or hits["remote"] else ""
    results().print(
        f"so far {counts['hits']:,} caches were found ({found}) and "
        f"{counts['misses'] + counts['corrupt']:,} computed again ({counts['corrupt']:,} damaged); "
        f"{counts['evictions']:,} evicted, {counts['failed_writes']:,} could not be written",
        markup=False,
    )
    if rows:
        _print_usage(rows, _collection_names(db), has_remote=remote is not None)


def _print_usage(rows: list[Usage], names: dict[str, str], *, has_remote: bool) -> None:
    from rich.table import Table

    table = Table()
    for column in ("collection", "model", "namespace"):
        table.add_column(column)
    remote = ("in remote",) if has_remote else ()
    for column in ("chunks", "on disk", "MB", *remote, "uses", "still to compute", "a chunk costs"):
        table.add_column(column, justify="right")
    for row in rows:
        cost = "nothing" if not row.missing_tokens else f"{row.missing_tokens:,} tokens"
        if row.missing_s:
            cost += f", {row.missing_s:.1f} s"
        table.add_row(
            names.get(row.owner, row.owner[:8] or "(none)"),
            row.model[:40],
            row.namespace,
            str(row.chunks),
            str(row.stored),
            f"{row.nbytes / 1e6:,.1f}",
            *([str(row.in_remote)] if has_remote else []),
            str(row.uses),
            cost,
            "?" if row.next_chunk_s is None else f"{row.next_chunk_s * 1e3:,.0f} ms",
        )
    results().print(table)


@app.command()
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


@app.command()
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
    from prophetkv_rag.chroma_store import live_references
    from prophetkv_rag.cli.other_remotes import other_remotes
    from prophetkv_rag.store.upkeep import gc as collect

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


@app.command()
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
    from prophetkv_rag.store.statistics import nameless
    from prophetkv_rag.store.upkeep import clear as delete

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


@app.command("new-key")
def new_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to make; one that is there is left alone.")],
    as_json: JsonOption = False,
) -> None:
    """Make a random key for encrypting caches (`index --key-file FILE`). Without it the caches cannot be read again."""
    from prophetkv_rag.store.encryption import write_new_key

    key = write_new_key(file)
    if as_json:
        print_json({"file": str(file), "key_id": key.id})
        return
    results().print(f"a new key is in {file}; its id is {key.id}", markup=False)


def open_caches(db: Path, *, needs_key: bool = True) -> DiskStore:
    """Open the chunk caches of a database with the limits it was made with.

    Args:
        db: The database.
        needs_key: Whether blobs are looked into; otherwise encrypted ones may also be handled without their key.

    Raises:
        InputError: If there is no database, or its key file cannot be read and is needed.
    """
    settings = require_settings(db)
    from prophetkv_rag.store.encryption import load_key
    from prophetkv_rag.store.opening import open_disk_store

    options = settings.store_options()
    try:
        options["encryption_key"] = load_key(options["encryption_key"])
    except InputError:
        if needs_key:
            raise
        options["encryption_key"] = None
    return open_disk_store(db.resolve() / BLOB_DIRECTORY, **options)


def _shown(report: VerifyReport | GcReport, store: DiskStore) -> dict[str, Any]:
    """A report as JSON; without a remote tier it says nothing of one."""
    values = asdict(report)
    return {name: value for name, value in values.items() if store.remote or not name.startswith("remote_")}


def _collection_names(db: Path) -> dict[str, str]:
    client, _ = open_chroma(db.resolve())
    return {str(collection.id): collection.name for collection in client.list_collections()}
