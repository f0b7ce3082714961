"""`prophetkv-rag bench store`: a corpus larger than the disk tier, under a Zipf-shaped stream of questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from prophetkv_rag.cli.cache.options import parse_size
from prophetkv_rag.cli.console import print_json, progress_bar, quiet_libraries, results
from prophetkv_rag.errors import InputError


def store(
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of the corpus.")] = 5000,
    limit: Annotated[str, typer.Option(help="Disk for caches.")] = "200MB",
    queries: Annotated[int, typer.Option(min=100, help="Questions asked.")] = 3000,
    eviction: Annotated[list[str], typer.Option(help="value or lru; repeatable.")] = ["value", "lru"],  # noqa: B006
    exponent: Annotated[float, typer.Option(min=0, help="Of Zipf's law.")] = 1.0,
    entries: Annotated[
        int | None,
        typer.Option(min=1, help="Instead: a catalog of so many chunks; how long do opening, finding, adding take?"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw a picture into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Index more than fits and ask about it, on a tiny random model: does the limit hold, do hits decay?"""
    quiet_libraries()
    if entries is not None:
        _catalog(entries, as_json=as_json)
        return
    from prophetkv_rag.evaluation.storage import plot_streams, run_stream
    from prophetkv_rag.store.catalog import Eviction

    most = parse_size(limit)
    if most is None:
        msg = "--limit must be a size, such as 200MB"
        raise InputError(msg)
    for name in eviction:
        if name not in get_args(Eviction):
            msg = f"--eviction {name!r} is not known; allowed: {', '.join(get_args(Eviction))}"
            raise InputError(msg)
    found = []
    for name in eviction:
        rule: Any = name
        with progress_bar(f"{queries} queries, {name}", queries) as advance:
            found.append(
                run_stream(
                    chunks=chunks, limit=most, queries=queries, exponent=exponent, eviction=rule, on_step=advance
                )
            )
    if plot is not None:
        plot_streams(found, plot)
    if as_json:
        print_json([result.to_dict() for result in found])
        return
    for result in found:
        third = max(1, len(result.hit_rate) // 3)
        parts = [result.hit_rate[i * third : (i + 1) * third] for i in range(3)]
        times = [result.ttft_ms[i * third : (i + 1) * third] for i in range(3)]
        results().print(
            f"{result.eviction}: hits {', '.join(f'{sum(p) / len(p):.1%}' for p in parts if p)} by thirds "
            f"(best possible {result.best_hit_rate:.1%}); first token after "
            f"{', '.join(f'{sum(t) / len(t):.1f}' for t in times if t)} ms; at most {result.peak_nbytes / 1e6:.1f} of "
            f"{result.limit / 1e6:.1f} MB at {result.samples} writes",
            markup=False,
        )


def _catalog(entries: int, *, as_json: bool) -> None:
    from prophetkv_rag.evaluation.storage import run_entries

    rounds = 5
    with progress_bar(f"a catalog of {entries:,} chunks", entries + rounds) as advance:
        result = run_entries(entries, rounds=rounds, on_step=advance)
    if as_json:
        print_json(result.to_dict())
        return
    results().print(
        f"{entries:,} chunks: opened in {result.open_ms:,.0f} ms, {result.open_cpu_ms:,.0f} ms of them on a processor "
        f"(the store alone {result.store_ms:.1f} ms); {result.index_mb:.0f} MB in memory; the {result.prompt_chunks} "
        f"chunks of a prompt of {result.prompt_chars:,} characters found in {result.find_ms:.1f} ms; a look-up takes "
        f"{result.look_up_us:.0f} us, asking what other processes added {result.new_entries_us:.0f} us, one more chunk "
        f"{result.add_us:,.0f} us (medians of {rounds} openings)",
        markup=False,
    )
