"""`prophetkv-rag cache export|import`: caches in a tar file, for another machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from prophetkv_rag.cli.cache.opened import DatabaseOption, JsonOption, open_caches
from prophetkv_rag.cli.console import print_json, progress_bar, results, status
from prophetkv_rag.cli.database_settings import DEFAULT_DATABASE
from prophetkv_rag.errors import InputError


def export_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Tar file to write.")],
    db: DatabaseOption = DEFAULT_DATABASE,
    as_json: JsonOption = False,
) -> None:
    """Write all caches to FILE, for `cache import` on another machine.

    It holds what the documents say, unless the caches are encrypted: then it is too, with the same key.
    """
    from prophetkv_rag.store.disk import export_caches

    store = open_caches(db, needs_key=False)
    with progress_bar("exporting", len(store.catalog.rows())) as advance:
        count = export_caches(store, file, advance)
    store.close()
    if as_json:
        print_json({"exported": count, "file": str(file), "nbytes": file.stat().st_size})
        return
    results().print(f"{count} caches in {file}, {file.stat().st_size / 1e6:,.1f} MB", markup=False)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Tar file that `cache export` wrote.")],
    db: DatabaseOption = DEFAULT_DATABASE,
    from_key_file: Annotated[
        Path | None, typer.Option(help="Key that FILE's caches are encrypted with, if it is not the database's own.")
    ] = None,
    from_plain: Annotated[
        bool, typer.Option("--from-plain", help="Take caches that are not encrypted into a database with a key.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Take the caches of FILE into a database. Every cache is checked; one that is not whole is refused.

    Only the caches' own model, settings and texts ever find them.
    """
    from prophetkv_rag.store.disk import import_caches
    from prophetkv_rag.store.encryption import load_key

    if from_plain and from_key_file is not None:
        msg = "give either --from-key-file or --from-plain: FILE's caches are encrypted, or they are not"
        raise InputError(msg)
    source_key = None if from_key_file is None else load_key(from_key_file)
    store = open_caches(db)
    with status("importing"):
        report = import_caches(store, file, source_key=source_key, is_plain=from_plain)
    store.close()
    if as_json:
        print_json(asdict(report))
    else:
        for name in report.refused:
            results().print(f"{'refused':>9}  {name}", markup=False)
        results().print(
            f"{report.added} caches added, {report.known} were there, {report.no_room} did not fit, "
            f"{len(report.refused)} refused",
            markup=False,
        )
    if report.refused:
        raise typer.Exit(1)
