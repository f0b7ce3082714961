"""`prophetkv-rag cache warm|rekey|export|import`: fill what is missing, change the key, move caches elsewhere."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from prophetkv_rag.cli.cache import DatabaseOption, JsonOption, open_caches
from prophetkv_rag.cli.console import print_json, progress_bar, quiet_libraries, results, status
from prophetkv_rag.cli.database import DEFAULT_DATABASE, open_database, require_settings, save_settings
from prophetkv_rag.cli.remote import push_caches
from prophetkv_rag.errors import InputError


def warm(db: DatabaseOption = DEFAULT_DATABASE, as_json: JsonOption = False) -> None:
    """Compute the caches that are missing, as far as the limit allows.

    Interrupted at any time, it goes on where it was: what is stored is not computed again. Exit status: 1 if the disk
    was full or could not be written to, and caches could not be kept.
    """
    settings = require_settings(db)
    quiet_libraries()
    from prophetkv_rag.cli.index import caches_not_kept, print_not_kept
    from prophetkv_rag.cli.model_choice import fetch_embedding

    fetch_embedding()
    database = open_database(db, settings)
    computed = 0
    try:
        with progress_bar("computing missing KV caches", database.collection.count()) as advance:

            def count(done: int, total: int) -> None:
                nonlocal computed
                computed += 1
                advance(1)

            database.collection.progress = count
            database.collection.cache_existing()
        database.collection.progress = None
        database.bring_caches_up_to_date()
        uploaded = push_caches(database.engine.store)
        stats = database.engine.store.stats()
        not_kept = caches_not_kept(database)
    finally:
        database.close()
    report = {"computed": computed, "chunks": stats.chunks, "nbytes": stats.nbytes, **uploaded, **not_kept}
    if as_json:
        print_json(report)
    else:
        results().print(
            f"{computed} caches computed; {stats.chunks} are stored, {stats.nbytes / 1e6:,.1f} MB", markup=False
        )
        print_not_kept(report, db)
    if report["caches_not_kept"]:
        raise typer.Exit(1)


def rekey(
    key_file: Annotated[str, typer.Option(metavar="FILE", help="The new key, or 'none' for no encryption any more.")],
    db: DatabaseOption = DEFAULT_DATABASE,
    as_json: JsonOption = False,
) -> None:
    """Encrypt all caches with another key, or for the first time. Nobody else may use the database meanwhile."""
    from prophetkv_rag.store.encryption import load_key
    from prophetkv_rag.store.key_mark import must_be_unlocked
    from prophetkv_rag.store.rekey import rekey as encrypt_anew

    settings = require_settings(db)
    new_file = "" if key_file == "none" else str(Path(key_file).absolute())
    new_key = load_key(new_file) if new_file else None
    store = open_caches(db)
    must_be_unlocked(store.files)
    save_settings(db, replace(settings, key_file=new_file))
    with progress_bar("writing caches anew", len(store.catalog.rows())) as advance:
        report = encrypt_anew(store, new_key, advance)
    store.close()
    if as_json:
        print_json({**asdict(report), "key_id": None if new_key is None else new_key.id})
        return
    how = "not encrypted any more" if new_key is None else f"encrypted with the key {new_key.id}"
    results().print(f"{report.changed} caches are {how}; {report.dropped} were dropped", markup=False)


def export_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Tar file to write.")],
    db: DatabaseOption = DEFAULT_DATABASE,
    as_json: JsonOption = False,
) -> None:
    """Write all caches to FILE, for `cache import` on another machine.

    It holds what the documents say, unless the caches are encrypted: then it is too, with the same key.
    """
    from prophetkv_rag.store.transfer import export_caches

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
    from prophetkv_rag.store.encryption import load_key
    from prophetkv_rag.store.transfer import import_caches

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
