"""`prophetkv-rag calibrate`: the smallest ratio per strategy that keeps a wanted fidelity, on one's own questions."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prophetkv_rag.cli.bench.conditions import conditions_of
from prophetkv_rag.cli.console import print_json, progress_bar, quiet_libraries, results, status
from prophetkv_rag.cli.database import check_packages, open_chroma, open_database
from prophetkv_rag.cli.database_settings import lead_in_of, require_settings, require_transformers
from prophetkv_rag.cli.measuring import check_length, check_writable
from prophetkv_rag.cli.model_choice import DeviceOption, DtypeOption, chosen_model, fetch_embedding, load_options
from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.profile import Profile

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


def calibrate(
    model: Annotated[str | None, typer.Argument(help="Model directory or name; the default model if left out.")] = None,
    db: Annotated[
        Path | None,
        typer.Option(help="Measure on this database's own chunks, with its model; then MODEL and --data are left out."),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --db: your own questions, one a line; else made from the chunks."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="With --db: no longer than about this.")] = 60.0,
    apply: Annotated[
        bool, typer.Option("--apply", help="With --db: use what was picked; caches are computed again if need be.")
    ] = False,
    data: Annotated[list[Path], typer.Option(help="JSON lines of id, question, answers, passages; repeatable.")] = [],  # noqa: B006
    agreement: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of full prefill's answer tokens that must be the same.")
    ] = 0.95,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="Strategies, with options; repeatable. Behind @: what chunks are encoded behind: prompt for the "
            "prompt's opening, corpus for a lead-in, previous:2 or neighbours:3 for other chunks; several as in "
            "prophetkv@prompt+corpus+previous:2. Left out: prophetkv, with --db behind each of these."
        ),
    ] = None,
    recompute_ratio: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, help="Ratios to try, 5% to 50% (with --db 30%) if left out; repeatable."),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    rows: Annotated[int, typer.Option(min=1, help="Questions per file.")] = 25,
    length: Annotated[int, typer.Option(min=128, help="Longest prompt, in tokens.")] = 4096,
    chunk_tokens: Annotated[int, typer.Option(min=16, help="Tokens per chunk.")] = 256,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer compared, in tokens.")] = 32,
    out: Annotated[Path, typer.Option(help="Where to write the profile.")] = Path("prophetkv-profile.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Find the smallest ratio that keeps full prefill's answers on your own questions, and write it to a profile.

    With --db on a database's own chunks; --rows, --length, --chunk-tokens and --answer-tokens are for --data alone.
    Measured rows are kept beside the profile (or in the database), so an interrupted run goes on where it stopped.

    A ratio measured with chunks encoded behind a lead-in or the prompt's opening (--strategy prophetkv@prompt+corpus)
    is only used by engines that encode theirs so: settings lead_in and prompt_template. The profile holds neither text.
    The lead-in it is measured with comes from a file's last question, which must not be among the --rows measured.
    """
    quiet_libraries()
    if db is not None:
        if model is not None or data or dtype is not None:
            msg = "--db measures on the database's own chunks, with its model; leave MODEL, --dtype and --data out"
            raise InputError(msg)
        ratios = sorted(set(recompute_ratio or ()))
        _on_database(db, questions, minutes, apply, agreement, strategy, ratios, out, as_json, device)
        return
    if questions is not None or apply:
        msg = "--questions and --apply go with --db, which names the database"
        raise InputError(msg)
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.evaluation.quality import FULL, PAPER, Engines, ResultsFile, arms_of, run_grid
    from prophetkv_rag.evaluation.quality import calibrate as profile_of
    from prophetkv_rag.evaluation.tasks import check_names, corpora_of, load_examples

    check_names([], data)
    arms = arms_of(strategy or ["prophetkv"], sorted(set(recompute_ratio or RATIOS)))
    rows_file = out.parent / f"{out.name.removesuffix('.json')}.rows.jsonl"
    check_writable(files=[out, rows_file])
    load = load_options(dtype, device)
    name = chosen_model(model)
    with status(f"loading {Path(name).name}"):
        engine = ProphetKVEngine.from_pretrained(name, config=PAPER, **load)
    check_length(length, engine.context_window)
    with status("making prompts"):
        examples, surroundings = load_examples(
            [], data, tokenizer=engine.tokenizer, rows=rows, length=length, chunk_tokens=chunk_tokens
        )
    machine = conditions_of(engine, name)
    conditions = {"length": length, "chunk_tokens": chunk_tokens, "answer_tokens": answer_tokens} | {
        key: machine[key] for key in ("model", "dtype", "transformers")
    }
    conditions["model_fingerprint"] = engine.identity.model
    file = ResultsFile(rows_file, conditions)
    with progress_bar(f"{len(examples)} questions x {len(arms)} arms", len(examples)) as advance:
        found = run_grid(
            Engines(engine, surroundings, corpora_of(examples, engine.tokenizer, chunk_tokens)),
            examples,
            arms,
            file,
            chunk_tokens=chunk_tokens,
            answer_tokens=answer_tokens,
            score_tokens=answer_tokens,
            on_step=advance,
        )
    specs = {arm.strategy for arm in arms} | {FULL}
    profile = profile_of(
        [row for row in found if row.strategy in specs],
        model=machine["model"],
        model_fingerprint=engine.identity.model,
        wanted_agreement=agreement,
        chunk_tokens=chunk_tokens,
        answer_tokens=answer_tokens,
    )
    profile.save(out)
    _print(profile, out, as_json=as_json)


def _on_database(
    db: Path,
    questions: Path | None,
    minutes: float,
    apply: bool,
    agreement: float,
    strategies: list[str] | None,
    ratios: list[float],
    out: Path,
    as_json: bool,
    device: str,
) -> None:
    from prophetkv_rag.cli.choosing import ROWS_FILE, documents_of, measure, print_choice, with_choice
    from prophetkv_rag.evaluation.quality import arms_of, choose

    settings = require_settings(db)
    require_transformers(settings, db)
    arms_of(strategies or [], [0.1])  # before a model is loaded
    check_packages(settings)
    check_writable(files=[out])
    fetch_embedding()
    client, collection = open_chroma(db.resolve())
    documents = documents_of(collection)
    if hasattr(client, "close"):
        client.close()
    lead_in = settings.lead_in or lead_in_of(documents[0][0] if documents else "", settings.lead_in_tokens)
    profile = measure(
        replace(settings, lead_in=lead_in),
        lambda tokenizer: documents,
        db / ROWS_FILE,
        wanted=agreement,
        minutes=minutes,
        questions=questions,
        strategies=strategies,
        ratios=ratios,
        device=device,
    )
    profile.save(out)
    _print(profile, out, as_json=as_json)
    choice = choose(profile)
    if not as_json:
        print_choice(choice, agreement)
    if apply:
        database = open_database(db, with_choice(replace(settings, lead_in=lead_in), choice), device=device)
        try:
            database.bring_caches_up_to_date()
        finally:
            database.close()
    elif not as_json:
        results().print("Not in use yet: the same command with --apply uses it, and goes on from what was measured.")


def _print(profile: Profile, out: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(profile))
        return
    from rich.table import Table

    console = results()
    wanted = f"{profile.wanted_agreement:.0%} of full prefill's answer tokens"
    title = f"Smallest ratio that keeps {wanted} ({profile.examples} questions)"
    table = Table(title=title)
    for number, column in enumerate(("strategy", "ratio", "charged", "measured: ratio -> same tokens (95%)")):
        table.add_column(column, justify="left" if number in (0, 3) else "right")
    for one in profile.strategies:
        table.add_row(
            one.strategy,
            "none" if one.recompute_ratio is None else f"{one.recompute_ratio:.0%}",
            "-" if one.charged_ratio is None else f"{one.charged_ratio:.1%}",
            ", ".join(
                f"{point['recompute_ratio']:.0%} -> {point['top1_agreement']:.1%} "
                f"({point['top1_low']:.1%} to {point['top1_high']:.1%})"
                for point in one.curve
            ),
        )
    console.print(table)
    console.print(f"written to {out}; use it with ProphetKVEngine.from_pretrained(..., profile={str(out)!r})")
    if any(one.encoding for one in profile.strategies):
        console.print(
            "An engine takes the best strategy that was measured with what its own config encodes chunks behind: "
            "prompt_template is @prompt, lead_in is @corpus, encoding is the rest."
        )
