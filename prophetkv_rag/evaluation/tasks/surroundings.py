"""What a task's chunks may be encoded behind: text of their kind that no measured prompt holds, and the opening."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.prompting import join_pieces, task_prompt
from prophetkv_rag.evaluation.tasks.ruler.haystack import NOISE_LINE

LEAD_IN_TOKENS = 256
RUN_WORDS = 12
"""Texts that share so many words in a row share a passage."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a task's chunks may be encoded behind, for the arms that ask for it.

    Attributes:
        lead_in: The last whole chunk of `LEAD_IN_TOKENS` of the spare example's context that shares no `RUN_WORDS`
            words in a row with any other context (RULER's constant noise line apart); `None` if there is no such chunk.
        opening: What the task's prompts begin with before the context, chat template included: what the spare and the
            first measured example share (few-shot examples that change from row to row are not part of it).
    """

    lead_in: str | None
    opening: str


def surroundings_of(
    spare: TaskExample, measured: TaskExample, others: Iterable[TaskExample], tokenizer: Any
) -> Surroundings:
    """Return a task's surroundings.

    Args:
        spare: An example that is not measured.
        measured: The first one that is.
        others: All whose contexts the lead-in must not be part of.
        tokenizer: Measures chunks.
    """
    chunks = join_pieces(spare.context, tokenizer, LEAD_IN_TOKENS)
    whole = chunks[:-1] or chunks
    held = _held(whole, others)
    heads = [
        str(task_prompt(example, tokenizer, LEAD_IN_TOKENS).prefix).splitlines(True) for example in (spare, measured)
    ]
    shared = takewhile(lambda lines: lines[0] == lines[1], zip(*heads, strict=False))
    return Surroundings(
        lead_in=next((chunk for number, chunk in reversed([*enumerate(whole)]) if number not in held), None),
        opening="".join(first for first, _ in shared),
    )


def _held(chunks: Sequence[str], others: Iterable[TaskExample]) -> set[int]:
    """Return the numbers of the chunks that share a run of words with another context."""
    of_run: dict[tuple[str, ...], set[int]] = {}
    for number, chunk in enumerate(chunks):
        for run in _runs(chunk):
            of_run.setdefault(run, set()).add(number)
    for run in _runs(f"{NOISE_LINE} " * 3):
        of_run.pop(run, None)
    held: set[int] = set()
    for example in others:
        for run in _runs("".join(example.context)):
            held |= of_run.get(run, set())
    return held


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = text.split()
    return zip(*(words[start:] for start in range(RUN_WORDS)), strict=False)
