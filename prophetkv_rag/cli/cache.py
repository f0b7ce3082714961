"""`prophetkv-rag cache stats|verify|gc|clear`: the chunk caches of a database, without loading its model."""

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
    from prophetkv_rag.store.disk import DiskStore
    from prophetkv_rag.store.statistics import Usage

app = typer.Typer(help="Look at, check and move the KV caches of a database.", no_args_is_help=True)

DatabaseOption = Annotated[Path, typer.Option("--db", help="Database directory, made by `prophetkv-rag index`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.command()
def stats(db: DatabaseOption = DEFAULT_DATABASE, as_json: JsonOption = False) -> None:
    """Say what is cached, per collection and model, how much it is used, and what is still to be computed."""
    from prophetkv_rag.store.statistics import all_counts, usage

    store = open_caches(db)
    values = asdict(store.stats())
    rows, limit, counts = usage(store), store.max_bytes, all_counts(store.catalog)
    store.close()
    shown = {key: values[key] for key in ("chunks", "tokens", "nbytes", "location")}
    if as_json:
        print_json({**shown, "limit": limit, "counts": counts, "usage": [asdict(row) for row in rows]})
        return
    mean = shown["nbytes"] / shown["tokens"] if shown["tokens"] else 0
    of_limit = "" if limit is None else f" of {limit / 1e6:,.1f} MB"
    results().print(
        f"{shown['chunks']} chunks, {shown['tokens']:,} tokens, {shown['nbytes'] / 1e6:,.1f} MB{of_limit} "
        f"({mean / 1e3:.1f} kB a token) in {shown['location']}",
        markup=False,
    )
    results().print(
        f"so far {counts['hits']:,} caches were found ({counts['ram_hits']:,} in RAM) and "
        f"{counts['misses'] + counts['corrupt']:,} computed again ({counts['corrupt']:,} damaged); "
        f"{counts['evictions']:,} evicted, {counts['failed_writes']:,} could not be written",
        markup=False,
    )
    if rows:
        _print_usage(rows, _collection_names(db))


def _print_usage(rows: list[Usage], names: dict[str, str]) -> None:
    from rich.table import Table

    table = Table()
    for column in ("collection", "model", "namespace"):
        table.add_column(column)
    for column in ("chunks", "on disk", "MB", "uses", "still to compute"):
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
            str(row.uses),
            cost,
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
        print_json(asdict(report))
    else:
        console = results()
        for title, keys in (("bad", report.bad), ("missing", report.missing), ("orphan", report.orphans)):
            for key in keys:
                console.print(f"{title:>9}  {key}", markup=False)
        if report.catalog:
            console.print(f"{'catalog':>9}  {report.catalog}", markup=False)
        ending = "" if not report.num_faults else ": repaired" if repair else "; --repair deletes them"
        console.print(f"{report.checked} caches checked, {report.num_faults} faults found{ending}", markup=False)
    if report.num_faults and not repair:
        raise typer.Exit(1)


@app.command()
def gc(
    db: DatabaseOption = DEFAULT_DATABASE,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds: what was written less long ago is left alone.")
    ] = 3600.0,
    as_json: JsonOption = False,
) -> None:
    """Delete the caches that no record of the database's collections refers to, and what a crash left.

    May run while others index and ask.
    """
    from prophetkv_rag.chroma_store import live_references
    from prophetkv_rag.store.upkeep import gc as collect

    store = open_caches(db)
    with status("looking for caches that belong to nothing"):
        client, _ = open_chroma(db.resolve())
        report = collect(store, partial(live_references, client), grace_s=grace)
    store.close()
    if as_json:
        print_json(asdict(report))
        return
    results().print(
        f"{report.unreferenced} caches and {report.orphans} stray files deleted, {report.freed_bytes / 1e6:,.1f} MB; "
        f"{report.stale_references} references to records that are gone",
        markup=False,
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
    from prophetkv_rag.store.upkeep import clear as delete

    store = open_caches(db)
    deleted = delete(store, namespace)
    left = store.stats()
    store.close()
    if as_json:
        print_json({"deleted": deleted, "chunks_left": left.chunks, "nbytes_left": left.nbytes})
        return
    results().print(f"{deleted} caches deleted; {left.chunks} are left, {left.nbytes / 1e6:,.1f} MB", markup=False)


def open_caches(db: Path) -> DiskStore:
    """Open the chunk caches of a database with the limits it was made with; `InputError` if there is no database."""
    settings = require_settings(db)
    from prophetkv_rag.store.disk import DiskStore

    options: Any = settings.store_options()
    return DiskStore(db.resolve() / BLOB_DIRECTORY, **options)


def _collection_names(db: Path) -> dict[str, str]:
    client, _ = open_chroma(db.resolve())
    return {str(collection.id): collection.name for collection in client.list_collections()}
