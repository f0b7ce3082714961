"""Measuring on a collection what suits it, for `index --fidelity` and `calibrate --db`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prophetkv_rag.cli.console import progress_bar, progress_console, results, status
from prophetkv_rag.cli.database import check_writable
from prophetkv_rag.cli.database_settings import DatabaseSettings
from prophetkv_rag.cli.model_choice import load_options

if TYPE_CHECKING:
    from prophetkv_rag.evaluation.quality import Choice
    from prophetkv_rag.profile import Profile

ROWS_FILE = "fidelity.rows.jsonl"
TOP_K = 8
MOST_RECORDS = 20_000
"""Of a larger collection only the first so many are drawn from."""


def measure(
    settings: DatabaseSettings,
    documents: Callable[[Any], Sequence[Sequence[str]]],
    rows: Path,
    *,
    wanted: float,
    minutes: float,
    top_k: int = TOP_K,
    questions: Path | None = None,
    strategies: Sequence[str] | None = None,
    ratios: Sequence[float] = (),
    device: str = "auto",
) -> Profile:
    """Load a database's model and measure on its chunks; rows are kept in `rows`, to go on from.

    Args:
        settings: The database's.
        documents: Returns its chunks, in order; called with the tokenizer.
        rows: A file in a directory that may be made.
        wanted: Share of full prefill's answer tokens that must be kept.
        minutes: No question is begun after this time.
        top_k: Chunks in a prompt.
        questions: File of the user's own questions.
        strategies: What is measured, if not the usual, and
        ratios: at which ratios.
        device: Where the model runs.

    Raises:
        InputError: For bad questions, an unknown strategy, fewer than two chunks, or too little time.
    """
    from prophetkv_rag.defaults import MiniLMEmbedder
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.evaluation.quality import PAPER, QUESTIONS, measure_collection
    from prophetkv_rag.evaluation.tasks import QUESTION_TEMPLATE, read_plain_questions, user_turn
    from prophetkv_rag.model import load_model

    asked = read_plain_questions(questions, QUESTIONS) if questions is not None else []
    check_writable(rows.parent)
    rows.parent.mkdir(parents=True, exist_ok=True)
    with status(f"loading {Path(settings.model).name}"):
        model, tokenizer = load_model(settings.model, **load_options(settings.dtype, device))
        engine = ProphetKVEngine(model, tokenizer, config=replace(PAPER, lead_in_tokens=settings.lead_in_tokens))
    before, _, after = QUESTION_TEMPLATE.partition("{context}")
    opening, _ = user_turn(tokenizer, before, after)
    with progress_bar(f"measuring for {minutes:g} minutes at most", len(asked) or QUESTIONS) as advance:
        return measure_collection(
            engine,
            documents(tokenizer),
            MiniLMEmbedder().embed,
            rows,
            opening=opening,
            lead_in=settings.lead_in or None,
            wanted_agreement=wanted,
            seconds=60 * minutes,
            top_k=top_k,
            chunk_tokens=settings.chunk_size,
            questions=asked,
            strategies=strategies,
            ratios=ratios,
            model=Path(settings.model).name,
            on_step=advance,
        )


def pick(
    settings: DatabaseSettings,
    texts: Sequence[str],
    db: Path,
    wanted: float,
    *,
    minutes: float,
    questions: Path | None,
    device: str,
) -> Choice | None:
    """Measure on documents that are to be indexed, see `measure`; `None`, which is said, if time was too short."""
    from prophetkv_rag.cli.indexing import split_texts
    from prophetkv_rag.evaluation.quality import TooLittleTimeError, choose

    try:
        profile = measure(
            settings,
            lambda tokenizer: split_texts(texts, settings.chunk_size, tokenizer),
            db / ROWS_FILE,
            wanted=wanted,
            minutes=minutes,
            questions=questions,
            device=device,
        )
    except TooLittleTimeError as error:  # no reason not to index
        progress_console().print(f"Nothing is picked, so what is set stays: {error}.", markup=False, soft_wrap=True)
        return None
    return choose(profile)


def with_choice(settings: DatabaseSettings, choice: Choice) -> DatabaseSettings:
    """Return the settings that were picked; with others, caches are computed again."""
    return replace(
        settings,
        encoding=choice.encoding,
        lead_in=settings.lead_in if choice.has_lead_in else "",
        strategy=choice.strategy,
        recompute_ratio=choice.recompute_ratio,
    )


def print_choice(choice: Choice, wanted: float) -> None:
    """Say in one line what was picked and what it is worth."""
    start = "picked: " if choice.is_enough else f"nothing that was measured keeps {wanted:.0%}; closest, and picked: "
    results().print(f"{start}{choice}", markup=False, soft_wrap=True)


def documents_of(collection: Any) -> list[list[str]]:
    """Return the texts of a Chroma collection in documents, in order, as far as its records tell."""
    from prophetkv_rag.chroma import Record, in_documents

    found = collection.get(include=["documents", "metadatas"], limit=MOST_RECORDS)
    columns = (found["ids"], found["documents"], found["metadatas"])
    return in_documents([Record(*row) for row in zip(*columns, strict=True)])
