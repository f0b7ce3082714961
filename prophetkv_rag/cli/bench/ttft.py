"""`prophetkv-rag bench ttft`: speed and memory on one's own machine and model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from prophetkv_rag.cli.bench.conditions import conditions_of
from prophetkv_rag.cli.bench.gguf_choice import check_gguf_option, choose_ggufs
from prophetkv_rag.cli.bench.ttft_tables import print_tables
from prophetkv_rag.cli.console import print_json, progress_bar, quiet_libraries, status
from prophetkv_rag.cli.model_choice import DeviceOption, DtypeOption, chosen_model, load_options
from prophetkv_rag.errors import InputError


def ttft(
    model: Annotated[
        str | None, typer.Option(help="Model directory or name; SmolLM2-135M-Instruct by default.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    context: Annotated[list[int], typer.Option(min=16, help="Context tokens; may be repeated.")] = [2048, 4096],  # noqa: B006
    recompute_ratio: Annotated[list[float], typer.Option(min=0, max=1, help="Ratios; repeatable.")] = [0.2],  # noqa: B006
    strategy: Annotated[
        list[str], typer.Option(help="Strategies, with options: prophetkv:context_share=0.5; repeatable.")
    ] = ["prophetkv"],  # noqa: B006
    chunk_tokens: Annotated[int, typer.Option(min=16, help="Tokens per chunk.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds measured per context, after one warm-up.")] = 5,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, in processes of their own.")] = True,
    peers: Annotated[
        bool, typer.Option(help="Also measure transformers' prefix reuse and, where it is installed, llama.cpp.")
    ] = True,
    gguf: Annotated[
        Path | None, typer.Option(help="The same model for llama.cpp to read; known for the default model.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw a picture into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Compare time to first token with full prefill (SDPA, same token ids), alternating in one process."""
    quiet_libraries()
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.evaluation.quality import Arm
    from prophetkv_rag.evaluation.speed import cost_per_token, measure_index_throughput, measure_ttft

    if gguf is not None:
        check_gguf_option(gguf, peers=peers)
    arms = [
        Arm(one, ratio)
        for one in dict.fromkeys(strategy)
        for ratio in ((0.0,) if one == "full_reuse" else dict.fromkeys(recompute_ratio))
    ]
    for arm in arms:
        arm.check(has_encodings=False)
    if plot is not None:  # what could go wrong after measuring is tried before
        from prophetkv_rag.evaluation import load_pyplot

        load_pyplot()
        try:
            plot.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"--plot: {plot} cannot be written: {error.strerror or error}"
            raise InputError(msg) from error
    load = load_options(dtype, device)
    name = chosen_model(model)
    with status(f"loading {Path(name).name}"):
        engine = ProphetKVEngine.from_pretrained(name, **load)
    report: dict[str, Any] = {"conditions": conditions_of(engine, name), "ttft": [], "peers": [], "loading": []}
    with tempfile.TemporaryDirectory() as folder:
        ggufs, report["left_out"] = (
            choose_ggufs(engine, gguf, is_default=model is None, folder=Path(folder)) if peers else ([], [])
        )
        if ggufs:
            report["conditions"]["llama-cpp-python"] = version("llama-cpp-python")
        with progress_bar("indexing against raw prefill", 1) as advance:
            report["index"] = measure_index_throughput(engine, chunk_tokens=chunk_tokens)
            advance(1)
        for context_tokens in dict.fromkeys(context):
            with progress_bar(f"{context_tokens} context tokens", repeats + 1) as advance:
                measured = measure_ttft(
                    engine,
                    arms,
                    context_tokens=context_tokens,
                    chunk_tokens=chunk_tokens,
                    repeats=repeats,
                    peers=peers,
                    ggufs=ggufs,
                    on_step=advance,
                )
            report["ttft"] += [one.to_dict() for one in measured.results]
            report["peers"] += [one.to_dict() for one in measured.peers]
            report["loading"].append(measured.loading.to_dict())
    report["cost_per_token"] = cost_per_token(report["ttft"])
    report["memory"] = [
        row
        for context_tokens in (dict.fromkeys(context) if memory else ())
        for row in _peak_memory(engine, name, arms, context_tokens, chunk_tokens)
    ]
    if plot is not None:
        from prophetkv_rag.evaluation.speed import plot_ttft

        plot_ttft(report["ttft"], report["peers"], plot)
    if as_json:
        print_json(report)
    else:
        print_tables(report)


def _peak_memory(
    engine: Any, model: str, arms: list[Any], context_tokens: int, chunk_tokens: int
) -> Iterator[dict[str, Any]]:
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.evaluation.quality import Arm
    from prophetkv_rag.evaluation.speed import corpus_prompt, peak_memory_bytes
    from prophetkv_rag.store.disk import DiskStore

    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(f"peak memory at {context_tokens} context tokens", 1 + len(arms)) as advance,
    ):
        store = DiskStore(Path(folder))
        indexer = ProphetKVEngine(engine.model, engine.tokenizer, store=store)
        indexer.add_chunks(corpus_prompt(indexer, context_tokens, chunk_tokens).chunks)
        store.close()
        full: dict[str, int] | None = None
        for arm in (Arm("full_prefill", 1.0), *arms):
            peak = peak_memory_bytes(
                model,
                Path(folder),
                context_tokens=context_tokens,
                chunk_tokens=chunk_tokens,
                strategy=arm.strategy,
                recompute_ratio=arm.recompute_ratio,
                dtype=engine.model.dtype,
                device=engine.model.device,
            )
            advance(1)
            if full is None:
                full = peak
            else:
                ratio = peak["peak"] / full["peak"]
                row = {"context_tokens": context_tokens, "strategy": arm.label, "peak_ratio": ratio}
                yield {**row, "full_prefill": full, "reused": peak}
