"""What all tasks share: settings, source files, and the shape of a task."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from prophetkv_rag.evaluation.tasks.example import TaskExample

TokenCounter = Callable[[TaskExample], int]
"""Tokens of the whole rendered prompt, chat template and answer prefix included."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Files that some tasks are made from.

    Attributes:
        essay_path: Text of the essay haystacks (UTF-8); without it the shipped speeches.
        squad_path: SQuAD 2.0 dev in its official JSON format (`.json` or `.json.gz`), for `ruler_qa_1`.
        hotpot_path: HotpotQA dev (distractor) in its official JSON format, or JSON lines of `{id, question, answers,
            passages[{title, text}]}`; either may be gzipped. For `ruler_qa_2`.
    """

    essay_path: Path | None = None
    squad_path: Path | None = None
    hotpot_path: Path | None = None


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """One task at one length.

    Attributes:
        task: Name with prefix, such as `ruler_vt`.
        max_seq_length: Tokens of prompt and answer together.
        seed: Of every random draw.
        count_tokens: Given by the harness, which knows the tokenizer and the chat template.
        sources: Files given by the user.
    """

    task: str
    max_seq_length: int
    seed: int
    count_tokens: TokenCounter
    sources: Sources = field(default_factory=Sources)

    def rng(self, *key: object) -> random.Random:
        """Return a fresh generator for this task, seed and key; the length is left out, so needles stay the same."""
        return random.Random("/".join(map(str, (self.task, self.seed, *key))))

    def shuffle(self, items: list[str]) -> None:
        """Shuffle in place by the seed alone, as RULER does: equally many items are permuted alike in every sample."""
        random.Random(self.seed).shuffle(items)

    def example_id(self, index: int) -> str:
        """Return an id that is unique within the task."""
        return f"{self.max_seq_length}-{self.seed}-{index}"

    def total_tokens(self, example: TaskExample) -> int:
        """Return the tokens of the prompt and of the longest answer."""
        return self.count_tokens(example) + example.max_new_tokens

    def fits(self, example: TaskExample) -> bool:
        """Whether the prompt and the longest answer keep to `max_seq_length`."""
        return self.total_tokens(example) <= self.max_seq_length


class SampleBuilder(Protocol):
    """A task that can make any of its samples at any size; the unit of size is the task's own.

    `build` must draw so that a larger size only adds to a smaller one: then the length grows with the size.

    Attributes:
        min_size: Smallest size that still is the task.
        max_size: Largest size there is material for, or `None`.
        num_available: Number of different samples, or `None` where there is no end.
    """

    min_size: int
    max_size: int | None
    num_available: int | None

    def build(self, index: int, size: int) -> TaskExample:
        """Return sample `index` at a size."""
        ...
