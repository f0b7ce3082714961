"""`prophetkv-rag bench kernels`: the GPU kernels against the device's limits and against PyTorch."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Annotated, Any

import typer

from prophetkv_rag.cli.console import print_json, progress_bar, results
from prophetkv_rag.errors import InputError

DTYPES = ("bfloat16", "float16", "float32")


def kernels(
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=16, max=256, help="Channels of a head.")] = 128,
    context: Annotated[int, typer.Option(min=128, help="Cached tokens.")] = 8192,
    recompute_ratio: Annotated[float, typer.Option(min=0.001, max=1, help="Fraction of them recomputed.")] = 0.2,
    question: Annotated[int, typer.Option(min=1, help="Tokens that ask in stage I.")] = 64,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens per chunk.")] = 512,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Time each GPU kernel on one layer's work: median, share of the roofline, FlexAttention and SDPA beside it.

    Without a CUDA or ROCm device it says so; nothing is estimated. The default is a layer of Llama-3.1-8B.
    """
    if heads % kv_heads:
        msg = f"--heads is {heads}; it must be a multiple of --kv-heads ({kv_heads})"
        raise InputError(msg)
    if dtype not in DTYPES:
        msg = f"--dtype is {dtype!r}; allowed: {', '.join(DTYPES)}"
        raise InputError(msg)
    if question >= context:
        msg = f"--question is {question}; it must be less than --context ({context})"
        raise InputError(msg)
    from prophetkv_rag.evaluation.speed import Shape, count_lines, has_device, measure_kernels

    shape = Shape(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        keys=context,
        rows=max(1, int(context * recompute_ratio)),
        question=question,
        chunk=chunk_tokens,
        dtype=dtype,
    )
    if has_device():
        with progress_bar("kernels", count_lines(shape)) as advance:
            measured = measure_kernels(shape, on_step=advance)
    else:
        measured = measure_kernels(shape)
    report = {"conditions": _conditions(), **measured}
    if as_json:
        print_json(report)
    else:
        _print(report)


def _conditions() -> dict[str, Any]:
    import torch

    from prophetkv_rag.kernels import ops

    is_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if is_gpu else "cpu",
        "kernels": ops.in_use("cuda" if is_gpu else "cpu"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "cuda": torch.version.cuda or torch.version.hip,
        "prophetkv_rag": version("prophetkv-rag"),
    }


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    console = results()
    if report["note"]:
        console.print(report["note"], markup=False)
    shape = report["shape"]
    table = Table(
        title=f"One layer: {shape['rows']} of {shape['keys']} rows, {shape['heads']} heads on {shape['kv_heads']} of "
        f"{shape['head_dim']}, {shape['dtype']}"
    )
    for column in ("kernel", "by"):
        table.add_column(column)
    for column in ("GB", "GFLOP", "ms (10%-90%)", "limit ms", "of roofline"):
        table.add_column(column, justify="right")
    for row in report["kernels"]:
        times = ("not measured", "-", "-")
        if row["ms"] is not None:
            spread = f"{row['ms']:.3f} ({row['ms_10']:.3f}-{row['ms_90']:.3f})"
            times = (spread, f"{row['limit_ms']:.3f}", f"{row['share_of_roofline']:.0%}")
        table.add_row(row["kernel"], row["variant"], f"{row['gigabytes']:.3f}", f"{row['gigaflops']:.1f}", *times)
    console.print(table)
    ceilings = report["ceilings"]
    if ceilings["copy_gb_per_s"] is not None:
        console.print(
            f"ceilings: copy {ceilings['copy_gb_per_s']:.0f} GB/s, "
            f"matrix product {ceilings['matmul_tflop_per_s']:.0f} TFLOP/s"
        )
    console.print(", ".join(f"{key} {value}" for key, value in report["conditions"].items()), markup=False)
