"""`prophetkv-rag bench ttft`: speed and memory on one's own machine and model."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from prophetkv_rag.cli.console import print_json, progress_bar, quiet_libraries, results, status
from prophetkv_rag.cli.model_choice import chosen_model

app = typer.Typer(help="Measure speed and fidelity on your own machine, model and data.", no_args_is_help=True)

_Model = Annotated[str | None, typer.Option(help="Model directory or name; SmolLM2-135M-Instruct by default.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
_Chunk = Annotated[int, typer.Option(min=16, help="Tokens per chunk.")]


def conditions_of(engine: Any, model: str) -> dict[str, Any]:
    """Return what a measurement depends on besides its own options."""
    import torch

    from prophetkv_rag.kernels import ops

    return {
        "model": Path(model).name,
        "dtype": engine.support.dtype,
        "device": str(engine.model.device),
        "kernels": ops.in_use(engine.model.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "prophetkv_rag": version("prophetkv-rag"),
    }


@app.command()
def ttft(
    model: _Model = None,
    context: Annotated[list[int], typer.Option(min=16, help="Context tokens; may be repeated.")] = [2048, 4096],  # noqa: B006
    recompute_ratio: Annotated[float, typer.Option(min=0, max=1, help="Fraction of chunk tokens recomputed.")] = 0.2,
    strategy: Annotated[str, typer.Option(help="Selection strategy.")] = "prophetkv",
    chunk_tokens: _Chunk = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs measured per context, after one warm-up.")] = 5,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, in processes of their own.")] = True,
    as_json: _Json = False,
) -> None:
    """Compare time to first token with full prefill (SDPA, same token ids), alternating in one process."""
    quiet_libraries()
    import tempfile

    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.evaluation.memory import peak_memory_bytes
    from prophetkv_rag.evaluation.ttft import corpus_prompt, measure_index_throughput, measure_ttft
    from prophetkv_rag.selection import make_strategy
    from prophetkv_rag.store.disk import DiskStore

    make_strategy(strategy)
    name = chosen_model(model)
    with status(f"loading {Path(name).name}"):
        engine = ProphetKVEngine.from_pretrained(name)
    report: dict[str, Any] = {"conditions": conditions_of(engine, name), "ttft": [], "memory": []}
    with progress_bar("indexing against raw prefill", 1) as advance:
        report["index"] = measure_index_throughput(engine, chunk_tokens=chunk_tokens)
        advance(1)
    for context_tokens in context:
        with progress_bar(f"{context_tokens} context tokens", repeats + 1) as advance:
            measured = measure_ttft(
                engine,
                context_tokens=context_tokens,
                chunk_tokens=chunk_tokens,
                recompute_ratio=recompute_ratio,
                strategy=strategy,
                repeats=repeats,
                on_step=advance,
            )
        report["ttft"].append(measured.to_dict())
    for context_tokens in context if memory else ():
        with (
            tempfile.TemporaryDirectory() as folder,
            progress_bar(f"peak memory at {context_tokens} context tokens", 2) as advance,
        ):
            store = DiskStore(Path(folder))
            indexer = ProphetKVEngine(engine.model, engine.tokenizer, store=store)
            indexer.add_chunks(corpus_prompt(indexer, context_tokens, chunk_tokens).chunks)
            store.close()
            peaks = {}
            for arm in ("full_prefill", strategy):
                peaks[arm] = peak_memory_bytes(
                    name,
                    Path(folder),
                    context_tokens=context_tokens,
                    chunk_tokens=chunk_tokens,
                    strategy=arm,
                    recompute_ratio=recompute_ratio,
                )
                advance(1)
            ratio = peaks[strategy]["peak"] / peaks["full_prefill"]["peak"]
            report["memory"].append({"context_tokens": context_tokens, "peak_ratio": ratio, **peaks})
    if as_json:
        print_json(report)
    else:
        _print_ttft(report, strategy)


def _print_ttft(report: dict[str, Any], strategy: str) -> None:
    from rich.table import Table

    console = results()
    table = Table(title=f"Time to first token, {strategy} against full prefill")
    for column in ("context", "ratio", "full s", "RAM s", "sooner (min-max)", "disk s", "sooner", "disk adds", "limit"):
        table.add_column(column, justify="right")
    for row in report["ttft"]:
        limit = 1 / row["recompute_ratio"] if row["recompute_ratio"] else float("inf")
        table.add_row(
            str(row["context_tokens"]),
            f"{row['recompute_ratio']:.0%}",
            f"{row['full_prefill_s']:.2f}",
            f"{row['ram_s']:.2f}",
            f"{row['speedup_ram']:.2f} ({row['speedup_ram_min']:.2f}-{row['speedup_ram_max']:.2f})",
            f"{row['disk_s']:.2f}",
            f"{row['speedup_disk']:.2f}",
            f"{row['disk_overhead']:.0%}",
            f"{limit:.1f}",
        )
    console.print(table)
    stages = Table(title="Where the time goes, seconds (medians, caches in RAM; load_disk: from a warm disk)")
    stages.add_column("context", justify="right")
    for name in report["ttft"][0]["stages_s"]:
        stages.add_column(name, justify="right")
    for row in report["ttft"]:
        stages.add_row(str(row["context_tokens"]), *(f"{value:.3f}" for value in row["stages_s"].values()))
    console.print(stages)
    index = report["index"]
    console.print(
        f"indexing: {index['index_tokens_per_s']:.0f} tokens/s, {index['share_of_raw']:.0%} of raw batched prefill "
        f"({index['raw_tokens_per_s']:.0f} tokens/s)"
    )
    for row in report["memory"]:
        console.print(
            f"peak memory at {row['context_tokens']} tokens: {row[strategy]['peak'] / 2**20:.0f} MiB, "
            f"{row['peak_ratio']:.2f} times full prefill's ({row['full_prefill']['peak'] / 2**20:.0f} MiB)"
        )
    console.print(", ".join(f"{key} {value}" for key, value in report["conditions"].items()))
