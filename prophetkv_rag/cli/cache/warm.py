"""`prophetkv-rag cache warm`: compute the caches that are missing."""

from __future__ import annotations

from typing import Annotated

import typer

from prophetkv_rag.cli.cache.opened import DatabaseOption, JsonOption
from prophetkv_rag.cli.cache.remote import push_caches
from prophetkv_rag.cli.console import print_json, progress_bar, quiet_libraries, results
from prophetkv_rag.cli.database import check_packages, open_database
from prophetkv_rag.cli.database_settings import DEFAULT_DATABASE, require_settings
from prophetkv_rag.cli.model_choice import DeviceOption
from prophetkv_rag.cli.vllm_engine import refuse_with_vllm


def warm(
    db: DatabaseOption = DEFAULT_DATABASE,
    refresh: Annotated[
        bool,
        typer.Option("--refresh", help="Also encode anew what stands behind others than most of its neighbours now."),
    ] = False,
    first_chunks: Annotated[
        bool,
        typer.Option(
            "--first-chunks",
            help="Also compute what a chunk is read from where a prompt begins with it: up to as many bytes again.",
        ),
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compute the caches that are missing, as far as the limit allows.

    Interrupted at any time, it goes on where it was: what is stored is not computed again. Exit status: 1 if the disk
    was full or could not be written to, and caches could not be kept.
    """
    settings = require_settings(db)
    if settings.engine == "vllm":
        refuse_with_vllm(("--device", device != "auto", "the database has settings of its own (index --vllm-args)"))
    quiet_libraries()
    check_packages(settings)
    from prophetkv_rag.cli.index_report import caches_not_kept, print_not_kept
    from prophetkv_rag.cli.model_choice import fetch_embedding

    fetch_embedding()
    database = open_database(db, settings, device=device)
    database.store.policy = "eager"  # whatever the database's is: now is when they are asked for
    computed = 0

    def count(done: int, total: int) -> None:
        nonlocal computed
        computed += 1
        advance(1)

    try:
        with progress_bar("computing missing KV caches", database.collection.count()) as advance:
            database.collection.progress = count
            database.collection.cache_existing()
        database.collection.progress = None
        database.bring_caches_up_to_date()
        database.complete_encoding(refresh=refresh)
        if first_chunks:
            with progress_bar("computing the first chunks' KV caches", database.collection.count()) as advance:
                database.add_second_caches(count)
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
