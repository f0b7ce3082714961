"""`prophetkv-rag ask QUESTION`: an answer with its sources and the reuse report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prophetkv_rag.cli.console import print_error, print_json, quiet_libraries, results, status
from prophetkv_rag.cli.database import check_packages, open_database
from prophetkv_rag.cli.database_settings import DEFAULT_DATABASE, require_settings, require_transformers
from prophetkv_rag.cli.model_choice import DeviceOption, DtypeOption, check_load_options, chosen_model, fetch_embedding
from prophetkv_rag.errors import InputError
from prophetkv_rag.text import argument_text

if TYPE_CHECKING:
    from prophetkv_rag.cli.answering import Answer


def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    db: Annotated[Path, typer.Option(help="Database directory, made by `prophetkv-rag index`.")] = DEFAULT_DATABASE,
    model: Annotated[
        str | None,
        typer.Option(help="Switch the database to another model: all its KV caches are computed again for that one."),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    top_k: Annotated[int, typer.Option(min=1, help="Chunks to retrieve.")] = 4,
    strategy: Annotated[
        str | None,
        typer.Option(help="Which chunk tokens are recomputed; the database's way if left out."),
    ] = None,
    recompute_ratio: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Share of them: 0 plain reuse, 1 full prefill; the database's if left out."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 128,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the prompt: tokens reused and recomputed, shaded by their score."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Answer QUESTION from the database, reusing the KV caches of the retrieved chunks."""
    question = argument_text(question)
    if not question.strip():
        msg = "the question is empty"
        raise InputError(msg)
    if html is not None:
        check_file(html)
    settings = require_settings(db)
    require_transformers(settings, db)
    from prophetkv_rag.reuse import make_strategy

    if strategy is not None:
        make_strategy(strategy)  # before a model is fetched
    quiet_libraries()
    check_packages(settings)
    settings = replace(settings, dtype=dtype or settings.dtype)
    check_load_options(settings.dtype, device)
    settings = replace(settings, model=chosen_model(model, settings.model))
    fetch_embedding()
    from prophetkv_rag.cli.answering import answer_question

    database = open_database(db, settings, device=device)
    try:
        if database.collection.count() == 0:
            msg = f"the database at {db} holds no chunks; index a directory first"
            raise InputError(msg)
        database.bring_caches_up_to_date()
        with status("answering"):
            answer = answer_question(
                database,
                question,
                top_k=top_k,
                max_new_tokens=max_new_tokens,
                strategy=strategy,
                recompute_ratio=recompute_ratio,
            )
    finally:
        database.close()
    if html is not None:
        write_html(html, question, answer)
    if as_json:
        print_json(answer.to_dict())
    else:
        print_answer(answer)


def check_file(path: Path) -> None:
    """Raise `InputError` if a file cannot be written at `path`; asked before the model is loaded."""
    problem = "is a directory" if path.is_dir() else None
    if not path.parent.is_dir():
        problem = f"cannot be written: there is no directory {path.parent}"
    if problem:
        msg = f"--html: {path} {problem}; name a file in a directory that exists"
        raise InputError(msg)


def write_html(path: Path, question: str, answer: Answer) -> None:
    """Write the report as a page, or say that there is none because the model was not asked."""
    if answer.report is None:
        print_error(f"--html: nothing was retrieved, so there is no prompt to draw; {path} was not written")
        return
    try:
        path.write_text(answer.report.to_html(title=question, answer=answer.text), encoding="utf-8")
    except OSError as error:
        msg = f"--html: cannot write {path}: {error.strerror or error}"
        raise InputError(msg) from error


def print_answer(answer: Answer) -> None:
    """Print an answer, one line per source, and the report's one line."""
    console = results()
    console.print(answer.text or "(the model gave an empty answer)", markup=False)
    console.print()
    for number, source in enumerate(answer.sources, start=1):
        words = " ".join(source.text.split())
        line = f"[{number}] {source.file} (score {source.score:.2f}): {words}"
        console.print(line, markup=False, no_wrap=True, overflow="ellipsis")
    if answer.report is not None:
        console.print()
        console.print(str(answer.report), markup=False, soft_wrap=True)
