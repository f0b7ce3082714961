"""Measuring on a collection itself, within a given time, what to encode its chunks behind and how much to recompute."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.quality.calibration import calibrate
from prophetkv_rag.evaluation.quality.engines import Engines
from prophetkv_rag.evaluation.quality.fidelity import arms_of
from prophetkv_rag.evaluation.quality.grid import run_grid
from prophetkv_rag.evaluation.quality.results import FULL, ResultsFile
from prophetkv_rag.evaluation.tasks.collection import (
    COLLECTION_TASK,
    SAMPLE_CHUNKS,
    collection_examples,
    make_questions,
    sample_corpus,
)
from prophetkv_rag.evaluation.tasks.corpus import Embed
from prophetkv_rag.evaluation.tasks.surroundings import Surroundings
from prophetkv_rag.profile import CORPUS, PROMPT, CalibratedStrategy, Profile, parse_behind

RATIOS = (0.05, 0.1, 0.2, 0.3)
OTHERS = ("", "+previous:2", "+neighbours:3")
"""Encodings that are tried: none but the opening, and these."""

LONG_PROMPT = 3000
"""Context tokens from which on `context_share` below 1 makes the first token sooner (docs/performance.md)."""

FEWEST = 8
"""Questions that are picked from at least: fewer say nothing."""

FEWEST_CHUNKS = 16
_INDEX_SHARE, _INDEX_COST = 1 / 3, 5.0
"""Of the time, what encoding the sample may take; and what all encodings cost, in plain ones (docs/encodings.md)."""

QUESTIONS = 32
ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Choice:
    """What was picked for a collection, and what it is worth there.

    Attributes:
        strategy: As `make_strategy` reads it.
        recompute_ratio: Share of the chunk tokens that is recomputed.
        has_lead_in: Whether chunks stand behind the lead-in.
        encoding: As `ProphetKVConfig.encoding`.
        agreement: Share of full prefill's answer tokens that are kept, with its 95% interval (`low`, `high`).
        kl: Mean divergence from full prefill, in nats.
        questions: How many were measured.
        is_enough: Whether the wanted agreement is kept; else this is what comes closest.
    """

    strategy: str
    recompute_ratio: float
    has_lead_in: bool
    encoding: str
    agreement: float
    low: float
    high: float
    kl: float
    questions: int
    is_enough: bool

    def __str__(self) -> str:
        behind = " and ".join(
            part for part in ("a lead-in" * self.has_lead_in, self.encoding * (self.encoding != "plain")) if part
        )
        return (
            f"chunks behind {behind or 'the opening alone'}, {self.strategy} at {self.recompute_ratio:.0%}: keeps "
            f"{self.agreement:.1%} ({self.low:.1%} to {self.high:.1%}) of full prefill's answer tokens, KL "
            f"{self.kl:.3f}, on {self.questions} questions of this collection"
        )


class TooLittleTimeError(InputError):
    """So few questions were measured in the time that nothing can be picked."""

    def __init__(self, done: int, seconds: float, took: float) -> None:
        enough = math.ceil(took * FEWEST / done / 60) + 1 if done else None
        super().__init__(
            f"{done} of at least {FEWEST} questions were measured in {seconds / 60:g} minutes: too few to pick from; "
            + (f"--minutes {enough} should be enough" if enough else "give more --minutes")
        )


def measure_collection(
    engine: ProphetKVEngine,
    documents: Sequence[Sequence[str]],
    embed: Embed,
    rows: Path,
    *,
    opening: str,
    lead_in: str | None,
    wanted_agreement: float,
    seconds: float,
    top_k: int,
    chunk_tokens: int,
    questions: Sequence[str] = (),
    strategies: Sequence[str] | None = None,
    ratios: Sequence[float] = (),
    model: str = "",
    on_step: Callable[[int], None] = lambda steps: None,
) -> Profile:
    """Measure encodings, ratios and shares on a sample of a collection's chunks.

    The answer to each question is compared with full prefill's of the same prompt, as `prophetkv-rag calibrate` does
    with a question file.

    Args:
        engine: Runs the model; encodes chunks behind the chat template's opening.
        documents: The collection's chunks, in order.
        embed: What the collection is searched with.
        rows: File that rows are kept in; measuring goes on from what is there of the same sample.
        opening: What prompts begin with before the chunks, chat template included.
        lead_in: Text that chunks may be encoded behind; `None` if there is none.
        wanted_agreement: Mean share of answer tokens that must agree with full prefill's.
        seconds: No question is begun after this time.
        top_k: Chunks in a prompt.
        chunk_tokens: Size of the chunks.
        questions: The user's own; made from the chunks if there are none.
        strategies: With what stands behind `@`; by default ProphetKV with every encoding.
        ratios: At which ratios; `RATIOS` if there are none.
        model: Its name, for the profile.
        on_step: As `run_grid`.

    Raises:
        InputError: If there are fewer than two chunks, or an unknown strategy.
        TooLittleTimeError: If fewer than `FEWEST` of more questions were measured in the time.
    """
    started = time.monotonic()
    until = started + seconds
    corpus = sample_corpus(documents, most=_affordable_chunks(engine, documents, seconds))
    asked = list(questions) or make_questions(corpus.chunks, QUESTIONS)
    found_in = [corpus.documents, top_k, opening, lead_in, engine.config.lead_in_tokens, engine.identity.model]
    examples = [
        # Rows kept of another sample, model or setting are of other examples, and left alone.
        replace(example, example_id=_digest([*found_in, example.query]))
        for example in collection_examples(corpus, asked, embed, top_k=top_k, answer_tokens=ANSWER_TOKENS)
    ]
    is_long = min(top_k, len(corpus.chunks)) * chunk_tokens >= LONG_PROMPT
    arms = arms_of(strategies or default_strategies(has_lead_in=lead_in is not None, is_long=is_long), ratios or RATIOS)
    done = 0

    def step(steps: int) -> None:
        nonlocal done
        done += steps
        on_step(steps)

    found = run_grid(
        Engines(engine, {COLLECTION_TASK: Surroundings(lead_in, opening)}, {COLLECTION_TASK: corpus}, embed=embed),
        examples,
        arms,
        ResultsFile(rows, {"task": COLLECTION_TASK}),
        chunk_tokens=chunk_tokens,
        answer_tokens=ANSWER_TOKENS,
        score_tokens=1,  # nobody knows the right answers
        on_step=step,
        is_over=lambda: time.monotonic() > until,
    )
    if done < min(FEWEST, len(examples)):
        raise TooLittleTimeError(done, seconds, time.monotonic() - started)
    wanted, at = {arm.strategy for arm in arms} | {FULL}, {arm.recompute_ratio for arm in arms}
    return calibrate(
        [row for row in found if row.strategy in wanted and (row.strategy == FULL or row.recompute_ratio in at)],
        model=model,
        model_fingerprint=engine.identity.model,
        wanted_agreement=wanted_agreement,
        chunk_tokens=chunk_tokens,
        answer_tokens=ANSWER_TOKENS,
    )


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _affordable_chunks(engine: ProphetKVEngine, documents: Sequence[Sequence[str]], seconds: float) -> int:
    """How many chunks can be encoded in every way within a share of the time, going by one of them."""
    chunk = next((chunk for document in documents for chunk in document if chunk.strip()), "")
    if not chunk:
        return FEWEST_CHUNKS
    started = time.monotonic()
    engine.remove_chunks(engine.add_chunks([chunk], owner=COLLECTION_TASK), owner=COLLECTION_TASK)
    took = time.monotonic() - started
    return max(FEWEST_CHUNKS, min(SAMPLE_CHUNKS, int(_INDEX_SHARE * seconds / (_INDEX_COST * took + 1e-6))))


def default_strategies(*, has_lead_in: bool, is_long: bool) -> list[str]:
    """Return ProphetKV with every encoding that is tried.

    Also behind a lead-in, if there is one, and where prompts are long with half of the context.
    """
    behind = [f"{PROMPT}{other}" for other in OTHERS] + [f"{PROMPT}+{CORPUS}+previous:2"] * has_lead_in
    options = ["first_chunk=exact"] + ["first_chunk=exact,context_share=0.5"] * is_long
    return [f"prophetkv:{option}@{one}" for option in options for one in behind]


def choose(profile: Profile) -> Choice:
    """Return the cheapest of a profile that keeps the wanted agreement, or what comes closest to it."""
    best = profile.best
    if best is not None:
        point = next(one for one in best.curve if one["recompute_ratio"] == best.recompute_ratio)
    else:
        points = [(one, point) for one in profile.strategies for point in one.curve]
        best, point = max(points, key=lambda pair: (pair[1]["top1_agreement"], -pair[1]["kl"]))
    return _choice(best, point, profile)


def _choice(best: CalibratedStrategy, point: dict[str, Any], profile: Profile) -> Choice:
    _, has_lead_in, encoding = parse_behind(best.encoding)
    return Choice(
        strategy=best.spec,
        recompute_ratio=point["recompute_ratio"],
        has_lead_in=has_lead_in,
        encoding=str(encoding),
        agreement=point["top1_agreement"],
        low=point["top1_low"],
        high=point["top1_high"],
        kl=point["kl"],
        questions=profile.examples,
        is_enough=profile.best is not None,
    )
