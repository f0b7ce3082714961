"""What `index` says of a database when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prophetkv_rag.cli.console import results
from prophetkv_rag.cli.database import Database


def cache_totals(database: Database) -> dict[str, Any]:
    """Number, tokens and bytes of the stored caches, and where they lie."""
    stats = database.engine.store.stats()
    return {"chunks": stats.chunks, "tokens": stats.tokens, "nbytes": stats.nbytes, "location": stats.location}


def caches_not_kept(database: Database) -> dict[str, Any]:
    """How many caches the store failed to take since it was opened (disk full, not writable), and why."""
    failures = database.engine.store.failures
    return {"caches_not_kept": failures.caches, "reason": failures.reason}


def print_not_kept(report: dict[str, Any], db: Path) -> None:
    """Say how many caches could not be kept, if any, and what to do."""
    if report["caches_not_kept"]:
        results().print(
            f"{report['caches_not_kept']} KV caches could not be kept ({report['reason']}). Answers are the same, only "
            f"later; when there is room: prophetkv-rag cache warm --db {db}",
            markup=False,
            soft_wrap=True,
        )


def print_report(report: dict[str, Any]) -> None:
    """Print what `index` reports."""
    console = results()
    for title, names in (("indexed", report["indexed"]), ("removed", report["removed"])):
        for name in names:
            console.print(f"{title:>9}  {name}", markup=False)
    for name, reason in report["skipped"].items():
        console.print(f"{'skipped':>9}  {name} ({reason})", markup=False)
    if report["unchanged"]:
        console.print(f"{'unchanged':>9}  {len(report['unchanged'])} files, skipped", markup=False)
    caches = report["caches"]
    console.print(
        f"{report['total_chunks']} chunks in {report['database']}, {report['new_chunks']} of them new, "
        f"in {report['seconds']:.1f} s; KV caches: {caches['tokens']:,} tokens, {caches['nbytes'] / 1e6:,.0f} MB, "
        f"encoding {report['encoding']}",
        markup=False,
        soft_wrap=True,
    )
    if report["ray"] is not None:
        done = report["ray"]
        console.print(
            f"{done['workers']} Ray workers computed {done['computed']} KV caches; {done['found']} were there already",
            markup=False,
        )
    print_not_kept(report, Path(report["database"]))
    if report["engine"] == "vllm":
        console.print(f"Next: prophetkv-rag serve --database {report['database']}", markup=False)
        return
    if report["recompute_ratio"] is None:
        console.print(
            "What to recompute was not measured on these documents; that takes minutes: prophetkv-rag calibrate "
            f"--db {report['database']} --apply",
            markup=False,
            soft_wrap=True,
        )
    console.print(f'Next: prophetkv-rag ask "your question" --db {report["database"]}', markup=False)
