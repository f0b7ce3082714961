"""`prophetkv-rag bench quality`: tasks x strategies x ratios against full prefill, on one's own model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prophetkv_rag.cli.bench.conditions import conditions_of
from prophetkv_rag.cli.console import print_json, progress_bar, quiet_libraries, results, status
from prophetkv_rag.cli.measuring import check_length, check_writable
from prophetkv_rag.cli.model_choice import DeviceOption, DtypeOption, chosen_model, load_options
from prophetkv_rag.errors import InputError

DEFAULT_STRATEGIES = ["full_reuse", "random", "prophetkv"]
DEFAULT_AGAINST = "prophetkv"
_Source = Annotated[Path | None, typer.Option(help="Source text of RULER; see docs/quality.md.")]


def quality(
    task: Annotated[
        list[str] | None, typer.Option(help="A task: ruler_..., longbench_...; repeatable. 'list' prints all.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Your own JSON lines of id, question, answers, passages; repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model directory or name; SmolLM2-135M-Instruct by default.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Examples per task.")] = 25,
    length: Annotated[int, typer.Option(min=128, help="Longest prompt, in tokens.")] = 2048,
    recompute_ratio: Annotated[list[float], typer.Option(min=0, max=1, help="Ratios; repeatable.")] = [0.1, 0.2],  # noqa: B006
    strategy: Annotated[
        list[str],
        typer.Option(
            help="Strategies, with options; behind @: what chunks are encoded behind, as prompt+corpus or "
            "prompt+previous:2 (docs/quality.md)."
        ),
    ] = DEFAULT_STRATEGIES,
    chunk_tokens: Annotated[int, typer.Option(min=16, help="Tokens per chunk.")] = 256,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer compared (KL), in tokens.")] = 32,
    score_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer scored; the task's official limit if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of generated tasks.")] = 42,
    essay: _Source = None,
    squad: _Source = None,
    hotpot: _Source = None,
    longbench: Annotated[Path | None, typer.Option(help="Folder or data.zip of LongBench v1.")] = None,
    against: Annotated[str, typer.Option(help="Strategy that the others are compared with.")] = DEFAULT_AGAINST,
    out: Annotated[
        Path | None, typer.Option(help="Keep every row in this file, and go on from what it holds already.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Also draw pictures into this folder.")] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Compare strategies with full prefill: KL over its own answer, official scores, paired bootstrap intervals."""
    quiet_libraries()
    import tempfile

    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.evaluation.quality import PAPER, Engines, ResultsFile, arms_of, run_grid, summarise, try_metrics
    from prophetkv_rag.evaluation.quality import markdown as markdown_of
    from prophetkv_rag.evaluation.tasks import (
        Sources,
        check_names,
        check_sources,
        corpora_of,
        load_examples,
        metric_names,
        task_names,
    )

    if task == ["list"]:
        typer.echo("\n".join(task_names()))
        return
    check_names(task or [], data or [])
    sources = Sources(essay, squad, hotpot)
    check_sources(task or [], length=length, seed=seed, sources=sources)
    try_metrics(metric_names(task or []))
    arms = arms_of(strategy, recompute_ratio)
    if against not in (known := dict.fromkeys(arm.strategy for arm in arms)) and against != DEFAULT_AGAINST:
        msg = f"--against is {against!r}, which is not measured; allowed: {', '.join(known)}"
        raise InputError(msg)
    # What could go wrong after hours of measuring is tried before.
    if plots is not None:
        from prophetkv_rag.evaluation import load_pyplot
        from prophetkv_rag.evaluation.quality import plot_against_budget, plot_tasks

        load_pyplot()
    check_writable(files=[markdown], folders=[plots])
    load = load_options(dtype, device)
    name = chosen_model(model)
    with status(f"loading {Path(name).name}"):
        engine = ProphetKVEngine.from_pretrained(name, config=PAPER, **load)
    check_length(length, engine.context_window)
    with status("making prompts"):
        examples, surroundings = load_examples(
            task or [],
            data or [],
            tokenizer=engine.tokenizer,
            rows=rows,
            length=length,
            chunk_tokens=chunk_tokens,
            seed=seed,
            sources=sources,
            longbench=longbench,
        )
    engines = Engines(engine, surroundings, corpora_of(examples, engine.tokenizer, chunk_tokens))
    measured = {
        "length": length,
        "chunk_tokens": chunk_tokens,
        "answer_tokens": answer_tokens,
        "score_tokens": score_tokens or "the task's",
        "seed": seed,
    }
    machine = conditions_of(engine, name)
    # What a number depends on; the machine may change between two runs of one file, the model may not.
    fixed = measured | {key: machine[key] for key in ("model", "dtype", "transformers")}
    fixed["model_fingerprint"] = engine.identity.model
    with tempfile.TemporaryDirectory() as folder:
        file = ResultsFile(out or Path(folder) / "results.jsonl", fixed)
        with progress_bar(f"{len(examples)} examples x {len(arms)} arms", len(examples)) as advance:
            found = run_grid(
                engines,
                examples,
                arms,
                file,
                chunk_tokens=chunk_tokens,
                answer_tokens=answer_tokens,
                score_tokens=score_tokens,
                on_step=advance,
            )
    summary = summarise(found, against=against)
    conditions = machine | measured
    if markdown is not None:
        markdown.write_text(markdown_of(summary, conditions, against=against), encoding="utf-8")
    if plots is not None:
        plot_against_budget(summary, plots / "budget.png")
        for ratio in recompute_ratio:
            plot_tasks(summary, plots / f"tasks_{round(100 * ratio)}.png", recompute_ratio=ratio)
        _draw_picks(engines, examples[0], arms, plots / "picks.png", chunk_tokens)
    if as_json:
        print_json({"conditions": conditions, "arms": summary})
    else:
        _print(summary, conditions, against)


def _draw_picks(engines: Any, example: Any, arms: Any, path: Path, chunk_tokens: int) -> None:
    from prophetkv_rag.evaluation.quality import picks_of, plot_picks

    picks, spans = picks_of(engines, example, arms, chunk_tokens=chunk_tokens)
    plot_picks(picks, spans, path, title=f"{example.task}, example {example.example_id}")


def _print(summary: list[dict[str, Any]], conditions: dict[str, Any], against: str) -> None:
    from rich.table import Table

    from prophetkv_rag.evaluation.quality import HEADER, POOLED, table_rows

    console = results()
    for task in dict.fromkeys(entry["task"] for entry in summary):
        if task != POOLED and len({entry["task"] for entry in summary}) == 2:
            continue  # one task: the pooled table says it all
        table = Table(title="all tasks pooled" if task == POOLED else task)
        for number, column in enumerate(HEADER):
            table.add_column(column.format(against=against), justify="right" if number else "left")
        for cells in table_rows(summary, task):
            table.add_row(*cells)
        console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in conditions.items()))
