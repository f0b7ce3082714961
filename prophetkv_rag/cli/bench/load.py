"""`prophetkv-rag bench load`: what loading caches from disk takes, and what other ways of loading would change."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from prophetkv_rag.cli.bench.conditions import conditions_of
from prophetkv_rag.cli.console import print_json, progress_bar, quiet_libraries, results, status
from prophetkv_rag.cli.model_choice import DeviceOption, DtypeOption, chosen_model, load_options
from prophetkv_rag.errors import InputError

_COLUMNS = (
    "context",
    "format",
    "MB",
    "page cache",
    "way",
    "load ms",
    "with assembly",
    "CPU ms",
    "ratio",
    "CPU ratio",
    "load / first token",
)


def load(
    model: Annotated[
        str | None, typer.Option(help="Model directory or name; SmolLM2-135M-Instruct by default.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    context: Annotated[list[int], typer.Option(min=16, help="Context tokens; may be repeated.")] = [512, 2048],  # noqa: B006
    blob_format: Annotated[
        list[str], typer.Option("--format", help="Formats; repeatable. 'exact+key' is exact and encrypted.")
    ] = ["exact", "fp16", "int8", "exact+key"],  # noqa: B006
    chunk_tokens: Annotated[int, typer.Option(min=16, help="Tokens per chunk.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds measured, after one warm-up.")] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Time loading caches from a warm and a cold disk against the prefill that needs them."""
    quiet_libraries()
    import os

    if not hasattr(os, "posix_fadvise"):
        msg = "bench load tells the kernel to forget files (posix_fadvise), which this system cannot; run it on Linux"
        raise InputError(msg)
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.evaluation.storage import measure_loading
    from prophetkv_rag.store.blobs import check_format

    formats = [(check_format(name.removesuffix("+key")), name.endswith("+key")) for name in dict.fromkeys(blob_format)]
    load = load_options(dtype, device)
    name = chosen_model(model)
    with status(f"loading {Path(name).name}"):
        engine = ProphetKVEngine.from_pretrained(name, **load)
    rows: list[Any] = []
    for context_tokens in dict.fromkeys(context):
        with progress_bar(f"{context_tokens} context tokens", len(formats) * (rounds + 1)) as advance:
            rows += measure_loading(
                engine,
                formats,
                context_tokens=context_tokens,
                chunk_tokens=chunk_tokens,
                rounds=rounds,
                on_step=advance,
            )
    conditions = {**conditions_of(engine, name), "chunk_tokens": chunk_tokens, "rounds": rounds}
    if as_json:
        print_json({"conditions": conditions, "load": [asdict(row) for row in rows]})
        return
    console = results()
    console.print("| " + " | ".join(_COLUMNS) + " |\n|" + "---|" * len(_COLUMNS), markup=False)
    for row in rows:
        console.print(
            f"| {row.context_tokens} | {row.blob_format} | {row.mbytes:.1f} | {'cold' if row.is_cold else 'warm'} "
            f"| {row.way} | {row.load_ms:.1f} | {row.total_ms:.1f} | {row.cpu_ms:.1f} | {row.ratio:.2f} "
            f"| {row.cpu_ratio:.2f} | {row.share_of_ttft:.1%} |",
            markup=False,
        )
    console.print(", ".join(f"{key} {value}" for key, value in conditions.items()), markup=False)
