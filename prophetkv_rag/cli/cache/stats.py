"""`prophetkv-rag cache stats`: what is cached, how much it is used, and what is still to compute."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from prophetkv_rag.cli.cache.opened import DatabaseOption, JsonOption, open_caches
from prophetkv_rag.cli.console import print_json, results
from prophetkv_rag.cli.database import open_chroma
from prophetkv_rag.cli.database_settings import DEFAULT_DATABASE

if TYPE_CHECKING:
    from prophetkv_rag.store.disk import Usage


def stats(db: DatabaseOption = DEFAULT_DATABASE, as_json: JsonOption = False) -> None:
    """Say what is cached, per collection and model, how much it is used, and what is still to be computed."""
    from prophetkv_rag.store.catalog import all_counts, hits_by_tier
    from prophetkv_rag.store.disk import usage

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


def _collection_names(db: Path) -> dict[str, str]:
    client, _ = open_chroma(db.resolve())
    return {str(collection.id): collection.name for collection in client.list_collections()}
