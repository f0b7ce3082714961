"""`prophetkv-rag cache stats|verify`: the chunk caches of a database."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prophetkv_rag.cli.console import print_json, results, status
from prophetkv_rag.cli.database import BLOB_DIRECTORY, DEFAULT_DATABASE, require_settings

if TYPE_CHECKING:
    from prophetkv_rag.store.disk import DiskStore

app = typer.Typer(help="Look at, and check, the KV caches of a database.", no_args_is_help=True)

DatabaseOption = Annotated[Path, typer.Option("--db", help="Database directory, made by `prophetkv-rag index`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.command()
def stats(db: DatabaseOption = DEFAULT_DATABASE, as_json: JsonOption = False) -> None:
    """Say how many chunks, tokens and bytes are cached."""
    store = _open(db)
    values = asdict(store.stats())
    store.close()
    shown = {key: values[key] for key in ("chunks", "tokens", "nbytes", "location")}
    if as_json:
        print_json(shown)
        return
    mean = shown["nbytes"] / shown["tokens"] if shown["tokens"] else 0
    results().print(
        f"{shown['chunks']} chunks, {shown['tokens']:,} tokens, {shown['nbytes'] / 1e6:,.1f} MB "
        f"({mean / 1e3:.1f} kB a token) in {shown['location']}",
        markup=False,
    )


@app.command()
def verify(
    db: DatabaseOption = DEFAULT_DATABASE,
    repair: Annotated[bool, typer.Option("--repair", help="Delete what is bad or belongs to nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read and check every cached chunk.

    Exit status: 0 if all is well or was repaired, 1 if something was found. Bad caches are never used: a chunk without
    a good one is computed again when it is next needed.
    """
    store = _open(db)
    with status("checking every cache"):
        report = store.verify(repair=repair)
    store.close()
    found = len(report.bad) + len(report.missing) + len(report.orphans)
    if as_json:
        print_json(asdict(report))
    else:
        console = results()
        for title, keys in (("bad", report.bad), ("missing", report.missing), ("orphan", report.orphans)):
            for key in keys:
                console.print(f"{title:>9}  {key}", markup=False)
        ending = "" if not found else ": repaired" if repair else "; --repair deletes them"
        console.print(f"{report.checked} caches checked, {found} faults found{ending}", markup=False)
    if found and not repair:
        raise typer.Exit(1)


def _open(db: Path) -> DiskStore:
    require_settings(db)
    from prophetkv_rag.store.disk import DiskStore

    return DiskStore(db.resolve() / BLOB_DIRECTORY)
