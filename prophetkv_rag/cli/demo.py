"""`prophetkv-rag demo`: the whole path on a shipped corpus, ProphetKV beside full prefill."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prophetkv_rag.cli.console import print_json, quiet_libraries, results, status
from prophetkv_rag.cli.database import Database, check_packages, open_database
from prophetkv_rag.cli.database_settings import (
    DEFAULT_CHUNK_SIZE,
    DEFAULTS,
    DatabaseSettings,
    find_settings,
    save_settings,
)
from prophetkv_rag.cli.documents import read_documents
from prophetkv_rag.cli.model_choice import DeviceOption, DtypeOption, check_load_options, chosen_model, fetch_embedding
from prophetkv_rag.config import parse_encoding

if TYPE_CHECKING:
    from prophetkv_rag.cli.demo_run import DemoRun

TOP_K = 4
MAX_NEW_TOKENS = 32


def demo(
    model: Annotated[
        str | None, typer.Option(help="Model directory or name; by default SmolLM2-135M-Instruct.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Index four speeches and answer six questions from them, with reused caches and by full prefill.

    The database is kept in the user's cache directory: a second run reuses the caches of the first.
    """
    quiet_libraries()
    check_packages(DatabaseSettings("", DEFAULT_CHUNK_SIZE))
    numbers = dtype or "auto"
    check_load_options(numbers, device)
    name = chosen_model(model)
    fetch_embedding()
    from prophetkv_rag.cli.demo_run import conditions, run_questions
    from prophetkv_rag.defaults import read_questions, speeches_directory

    path = _database_path(name, numbers)
    with speeches_directory() as speeches:
        documents = read_documents(speeches, exclude=path)
        database = _open(path, name, numbers, device)
        try:
            indexing = _index(database, speeches, documents)
            if not as_json:
                _print_indexing(indexing)
            questions = read_questions()
            with status("warming up"):
                run_questions(database, questions[:1], top_k=TOP_K, max_new_tokens=1)
            runs = []
            for number, question in enumerate(questions, start=1):
                with status(f"question {number} of {len(questions)}: with reused caches, then by full prefill"):
                    runs += run_questions(database, [question], top_k=TOP_K, max_new_tokens=MAX_NEW_TOKENS)
                if not as_json:
                    _print_run(runs[-1])
            facts = conditions(database, indexing)
        finally:
            database.close()
    if as_json:
        print_json({"indexing": indexing, "questions": [run.to_dict() for run in runs], "conditions": facts})
    else:
        _print_table(runs, facts)


def _database_path(model: str, dtype: str) -> Path:
    """Return where the demo's database of a model lies, which in other numbers is another."""
    from prophetkv_rag.defaults import cache_directory

    return cache_directory() / "demo" / (Path(model).name + ("" if dtype == "auto" else f"-{dtype}"))


def _open(path: Path, model: str, dtype: str, device: str) -> Database:
    remembered = find_settings(path)
    cached_for = remembered.cached_for if remembered else ""
    encoding = str(parse_encoding(DEFAULTS.encoding))
    settings = DatabaseSettings(model, DEFAULT_CHUNK_SIZE, cached_for, encoding=encoding, behind_prompt=True)
    database = open_database(path, replace(settings, dtype=dtype), device=device)
    save_settings(path, database.settings)
    return database


def _index(database: Database, speeches: Path, documents: Any) -> dict[str, Any]:
    from prophetkv_rag.cli.indexing import index_documents

    started = time.perf_counter()
    recomputed = database.bring_caches_up_to_date()
    summary = asdict(index_documents(database, speeches, documents, only_corpus="the shipped corpus"))
    summary["seconds"] = time.perf_counter() - started  # those of both
    stats = database.engine.store.stats()
    summary["computed_chunks"] = max(recomputed, summary["new_chunks"])
    summary["caches"] = {"tokens": stats.tokens, "nbytes": stats.nbytes, "location": stats.location}
    return summary


def _print_indexing(indexing: dict[str, Any]) -> None:
    caches = indexing["caches"]
    size = f"{indexing['total_chunks']} chunks, {caches['tokens']:,} tokens, {caches['nbytes'] / 1e6:,.0f} MB"
    if indexing["computed_chunks"]:
        text = f"KV caches computed in {indexing['seconds']:.0f} s ({size}) and kept in {caches['location']}"
    else:
        text = f"KV caches reused from an earlier run, nothing computed ({size}): {caches['location']}"
    results().print(text, markup=False, soft_wrap=True)


def _print_run(run: DemoRun) -> None:
    console = results()
    console.print(f"\n[bold]{_escaped(run.question)}[/bold]")
    report = run.reused.report
    for name, answer in (("prophetkv", run.reused), ("full prefill", run.full)):
        seconds = answer.report.timings_s.ttft if answer.report else 0.0
        line = f"  {name:<13} first token after {seconds:5.2f} s   {' '.join(answer.text.split())}"
        console.print(line, markup=False, soft_wrap=True)
    if report is not None:
        counts = f"{report.reused_tokens} reused, {report.recomputed_tokens} recomputed, {report.fresh_tokens} fresh"
        console.print(f"  {'tokens':<13} {report.prompt_tokens} = {counts}", markup=False)
    for source in run.reused.sources:
        line = f"  source        {source.file} (score {source.score:.2f}): {' '.join(source.text.split())}"
        console.print(line, markup=False, no_wrap=True, overflow="ellipsis")


def _print_table(runs: list[DemoRun], facts: dict[str, Any]) -> None:
    from rich.table import Table

    console = results()
    table = Table(title="\nTime to first token, and what the answer was made from", title_justify="left")
    table.add_column("question", ratio=1)
    for column in ("full prefill", "prophetkv", "sooner", "reused", "recomputed", "fresh", "right*"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        if run.reused.report is None or run.full.report is None:
            continue
        report, full = run.reused.report, run.full.report
        table.add_row(
            run.question,
            f"{full.timings_s.ttft:.2f} s",
            f"{report.timings_s.ttft:.2f} s",
            f"{run.speedup:.1f}x",
            str(report.reused_tokens),
            str(report.recomputed_tokens),
            str(report.fresh_tokens),
            f"{'yes' if run.is_right(run.reused) else 'no'}/{'yes' if run.is_right(run.full) else 'no'}",
        )
    console.print(table)
    console.print("* whether the answer holds the expected words: prophetkv / full prefill\n", markup=False)
    for key, value in facts.items():
        console.print(f"{key.replace('_', ' '):<13} {value}", markup=False, soft_wrap=True)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
