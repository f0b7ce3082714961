"""`prophetkv-rag bench ttft`: speed and memory on one's own machine and model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prophetkv_rag.cli.bench import conditions_of
from prophetkv_rag.cli.console import print_json, progress_bar, quiet_libraries, results, status
from prophetkv_rag.cli.model_choice import chosen_model
from prophetkv_rag.errors import InputError


def ttft(
    model: Annotated[
        str | None, typer.Option(help="Model directory or name; SmolLM2-135M-Instruct by default.")
    ] = None,
    context: Annotated[list[int], typer.Option(min=16, help="Context tokens; may be repeated.")] = [2048, 4096],  # noqa: B006
    recompute_ratio: Annotated[list[float], typer.Option(min=0, max=1, help="Ratios; repeatable.")] = [0.2],  # noqa: B006
    strategy: Annotated[list[str], typer.Option(help="Strategies; repeatable.")] = ["prophetkv"],  # noqa: B006
    chunk_tokens: Annotated[int, typer.Option(min=16, help="Tokens per chunk.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds measured per context, after one warm-up.")] = 5,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, in processes of their own.")] = True,
    peers: Annotated[bool, typer.Option(help="Also measure transformers' prefix reuse.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Also draw a picture into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Compare time to first token with full prefill (SDPA, same token ids), alternating in one process."""
    quiet_libraries()
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.evaluation.fidelity import Arm
    from prophetkv_rag.evaluation.index_speed import measure_index_throughput
    from prophetkv_rag.evaluation.ttft import measure_ttft

    arms = [
        Arm(one, ratio)
        for one in dict.fromkeys(strategy)
        for ratio in ((0.0,) if one == "full_reuse" else dict.fromkeys(recompute_ratio))
    ]
    for arm in arms:
        arm.check(encodings=())
    if plot is not None:  # what could go wrong after measuring is tried before
        from prophetkv_rag.evaluation.plots import load_pyplot

        load_pyplot()
        try:
            plot.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"--plot: {plot} cannot be written: {error.strerror or error}"
            raise InputError(msg) from error
    name = chosen_model(model)
    with status(f"loading {Path(name).name}"):
        engine = ProphetKVEngine.from_pretrained(name)
    report: dict[str, Any] = {"conditions": conditions_of(engine, name), "ttft": [], "peers": [], "memory": []}
    with progress_bar("indexing against raw prefill", 1) as advance:
        report["index"] = measure_index_throughput(engine, chunk_tokens=chunk_tokens)
        advance(1)
    for context_tokens in dict.fromkeys(context):
        with progress_bar(f"{context_tokens} context tokens", repeats + 1) as advance:
            measured, others = measure_ttft(
                engine,
                arms,
                context_tokens=context_tokens,
                chunk_tokens=chunk_tokens,
                repeats=repeats,
                peers=peers,
                on_step=advance,
            )
        report["ttft"] += [one.to_dict() for one in measured]
        report["peers"] += [one.to_dict() for one in others]
    for context_tokens in dict.fromkeys(context) if memory else ():
        report["memory"].append(_peak_memory(engine, name, arms[0], context_tokens, chunk_tokens))
    if plot is not None:
        from prophetkv_rag.evaluation.plots import plot_ttft

        plot_ttft(report["ttft"], report["peers"], plot)
    if as_json:
        print_json(report)
    else:
        _print(report)


def _peak_memory(engine: Any, model: str, arm: Any, context_tokens: int, chunk_tokens: int) -> dict[str, Any]:
    import tempfile

    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.evaluation.memory import peak_memory_bytes
    from prophetkv_rag.evaluation.ttft import corpus_prompt
    from prophetkv_rag.store.disk import DiskStore

    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(f"peak memory at {context_tokens} context tokens", 2) as advance,
    ):
        store = DiskStore(Path(folder))
        indexer = ProphetKVEngine(engine.model, engine.tokenizer, store=store)
        indexer.add_chunks(corpus_prompt(indexer, context_tokens, chunk_tokens).chunks)
        store.close()
        peaks = {}
        for label, strategy in (("full_prefill", "full_prefill"), ("reused", arm.strategy)):
            peaks[label] = peak_memory_bytes(
                model,
                Path(folder),
                context_tokens=context_tokens,
                chunk_tokens=chunk_tokens,
                strategy=strategy,
                recompute_ratio=arm.recompute_ratio,
            )
            advance(1)
    ratio = peaks["reused"]["peak"] / peaks["full_prefill"]["peak"]
    return {"context_tokens": context_tokens, "strategy": arm.label, "peak_ratio": ratio, **peaks}


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    console = results()
    table = Table(title="Time to first token against full prefill, medians")
    columns = ("context", "strategy", "full s", "RAM s", "sooner (min-max)", "limit", "of it", "disk adds", "decode")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 1 else "right")
    for row in report["ttft"]:
        table.add_row(
            str(row["context_tokens"]),
            _label(row),
            f"{row['full_prefill_s']:.2f}",
            f"{row['ram_s']:.2f}",
            f"{row['speedup_ram']:.2f} ({row['speedup_ram_min']:.2f}-{row['speedup_ram_max']:.2f})",
            f"{row['limit']:.2f}",
            f"{row['share_of_limit']:.0%}",
            f"{row['disk_overhead']:.0%}",
            f"{row['decode_ratio']:.2f}",
        )
    for row in report["peers"]:
        spread = f"{row['speedup']:.2f} ({row['speedup_min']:.2f}-{row['speedup_max']:.2f})"
        table.add_row(str(row["context_tokens"]), row["peer"], "", "", spread, "", "", "", "")
    console.print(table)
    console.print(
        "limit: full prefill's arithmetic over that of the rows that were run; decode: speed after reuse over that "
        "after full prefill"
    )
    stages = Table(title="Where the time goes, seconds (medians, caches in RAM; load_disk: from a warm disk)")
    stages.add_column("context", justify="right")
    stages.add_column("strategy")
    for name in report["ttft"][0]["stages_s"]:
        stages.add_column(name, justify="right")
    for row in report["ttft"]:
        values = (f"{value:.3f}" for value in row["stages_s"].values())
        stages.add_row(str(row["context_tokens"]), _label(row), *values)
    console.print(stages)
    index = report["index"]
    console.print(
        f"indexing: {index['index_tokens_per_s']:.0f} tokens/s, {index['share_of_raw']:.0%} of raw batched prefill "
        f"({index['raw_tokens_per_s']:.0f} tokens/s)"
    )
    for row in report["memory"]:
        console.print(
            f"peak memory at {row['context_tokens']} tokens, {row['strategy']}: "
            f"{row['reused']['peak'] / 2**20:.0f} MiB, {row['peak_ratio']:.2f} times full prefill's "
            f"({row['full_prefill']['peak'] / 2**20:.0f} MiB)"
        )
    console.print(", ".join(f"{key} {value}" for key, value in report["conditions"].items()))


def _label(row: dict[str, Any]) -> str:
    ratio = row["recompute_ratio"]
    return str(row["strategy"]) if ratio == 0 else f"{row['strategy']} {ratio:.0%}"
