"""`prophetkv-rag bench formats`: what each format of stored caches costs and saves, on one's own model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from prophetkv_rag.cli.bench.conditions import conditions_of
from prophetkv_rag.cli.console import print_json, progress_bar, quiet_libraries, results, status
from prophetkv_rag.cli.model_choice import DeviceOption, DtypeOption, chosen_model, load_options

_COLUMNS = ("format", "kB a token", "load ms per 1,000 tokens", "zstd leaves", "ratio", "KL", "above exact", "same top")


def formats(
    model: Annotated[
        str | None, typer.Option(help="Model directory or name; SmolLM2-135M-Instruct by default.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    prompts: Annotated[int, typer.Option(min=1, help="Shipped questions to ask.")] = 6,
    context: Annotated[int, typer.Option(min=16, help="Context tokens of a prompt.")] = 768,
    chunk_tokens: Annotated[int, typer.Option(min=16, help="Tokens per chunk.")] = 128,
    recompute_ratio: Annotated[list[float], typer.Option(min=0, max=1, help="Ratios; repeatable.")] = [0.0, 0.2],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Compare the formats of stored caches: size, load time, distance to full prefill."""
    quiet_libraries()
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.evaluation.storage import demo_prompts, measure_formats
    from prophetkv_rag.store.blobs import BlobFormat

    load = load_options(dtype, device)
    name = chosen_model(model)
    with status(f"loading {Path(name).name}"):
        engine = ProphetKVEngine.from_pretrained(name, **load)
    asked = demo_prompts(engine, count=prompts, context_tokens=context, chunk_tokens=chunk_tokens)
    names = get_args(BlobFormat)
    with progress_bar("formats", len(asked) * (1 + len(names))) as advance:
        rows = measure_formats(engine, asked, names, ratios=recompute_ratio, on_step=advance)
    conditions = {**conditions_of(engine, name), "prompts": prompts, "context": context, "chunk_tokens": chunk_tokens}
    if as_json:
        print_json({"conditions": conditions, "formats": [asdict(row) for row in rows]})
        return
    console = results()
    console.print("| " + " | ".join(_COLUMNS) + " |\n|" + "---|" * len(_COLUMNS), markup=False)
    for row in rows:
        console.print(_line(row), markup=False)
    console.print(", ".join(f"{key} {value}" for key, value in conditions.items()), markup=False)


def _line(row: Any) -> str:
    zstd = "-" if row.zstd_ratio is None else f"{row.zstd_ratio:.0%}"
    return (
        f"| {row.blob_format} | {row.bytes_per_token / 1e3:.1f} | {row.load_ms_per_1000_tokens:.1f} | {zstd} "
        f"| {row.recompute_ratio:.0%} | {row.kl:.4f} | {row.kl_above_exact:+.4f} | {row.top1_agreement:.1%} |"
    )
