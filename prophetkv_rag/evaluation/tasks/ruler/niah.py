"""Needles in a haystack: sentences that give a key its value, hidden in text; eight of the 13 tasks."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.ruler.haystack import (
    NOISE_LINE,
    essay_words,
    first_words,
    insert_units,
    lines_to_pieces,
    spaced_to_pieces,
    split_sentences,
)
from prophetkv_rag.evaluation.tasks.ruler.settings import TaskSettings
from prophetkv_rag.evaluation.tasks.ruler.words import WordLists, word_lists

BEFORE = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
QUESTION = "What {are_all} the special magic {kind} for {query} mentioned in the provided text?"
ANSWER_PREFIX = " The special magic {kind} for {query} mentioned in the provided text {are}"
NEEDLE = "One of the special magic {kinds} for {key} is: {value}."
PLURAL = {"some": "Some", "are": "are", "are_all": "are all"}
SINGULAR = {"some": "A", "are": "is", "are_all": "is"}
DEPTHS = [round(100 * step / 39) for step in range(40)]
"""Where needles may lie in an essay, in percent of its sentences."""

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True, slots=True)
class NiahVariant:
    """A row of RULER's task table; every key gets `num_values` values, and `num_queries` keys are asked for."""

    haystack: Literal["noise", "essay", "needle"]
    key: Kind = "words"
    value: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


VARIANTS = {
    "single_1": NiahVariant("noise"),
    "single_2": NiahVariant("essay"),
    "single_3": NiahVariant("essay", value="uuids"),
    "multikey_1": NiahVariant("essay", num_keys=4),
    "multikey_2": NiahVariant("needle"),
    "multikey_3": NiahVariant("needle", key="uuids", value="uuids"),
    "multivalue": NiahVariant("essay", num_values=4),
    "multiquery": NiahVariant("essay", num_keys=4, num_queries=4),
}


class Niah:
    """One variant; a size counts words of the essay, or lines of the other haystacks, needles not included."""

    def __init__(self, settings: TaskSettings, variant: NiahVariant) -> None:
        self.settings = settings
        self.variant = variant
        self.min_size = 50 if variant.haystack == "essay" else 5
        self.max_size: int | None = None
        self.num_available: int | None = None
        self._words = word_lists() if "words" in (variant.key, variant.value) else None
        self._essay = essay_words(settings.sources.essay_path) if variant.haystack == "essay" else []

    def build(self, index: int, size: int) -> TaskExample:
        """Return sample `index` in a haystack of `size` words or lines."""
        variant = self.variant
        rng = self.settings.rng(index)
        draw = _DistinctDraws(rng, self._words)
        keys = [draw(variant.key) for _ in range(variant.num_keys)]
        values = {key: [draw(variant.value) for _ in range(variant.num_values)] for key in keys}
        asked = rng.sample(keys, variant.num_queries)
        needles = [self._needle(key, value) for key in keys for value in values[key]]
        self.settings.shuffle(needles)
        context = self._context(needles, size, rng, draw)
        references = tuple(value for key in asked for value in values[key])
        words = {**(SINGULAR if len(references) == 1 else PLURAL), "query": _enumerate(asked)}
        words["kind"] = variant.value.removesuffix("s") if len(references) == 1 else variant.value
        question = QUESTION.format_map(words)
        return TaskExample(
            task=self.settings.task,
            example_id=self.settings.example_id(index),
            before=BEFORE.format_map(words),
            context=context,
            after=f"\n{question}",
            query=question,
            answer_prefix=ANSWER_PREFIX.format_map(words),
            references=references,
            metric="string_match_all",
            max_new_tokens=128,
        )

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kinds=self.variant.value, key=key, value=value)

    def _context(self, needles: Sequence[str], size: int, rng: random.Random, draw: _DistinctDraws) -> tuple[str, ...]:
        if self.variant.haystack == "essay":
            sentences = split_sentences(first_words(self._essay, size))
            depths = sorted(rng.sample(DEPTHS, len(needles)))
            positions = [int(len(sentences) * (depth / 100)) for depth in depths]
            return spaced_to_pieces(insert_units(sentences, positions, needles))
        lines = [NOISE_LINE] * size
        if self.variant.haystack == "needle":
            lines = [self._needle(draw(self.variant.key), draw(self.variant.value)) for _ in range(size)]
        return lines_to_pieces(insert_units(lines, sorted(rng.sample(range(size), len(needles))), needles))


class _DistinctDraws:
    """Random words, numbers and uuids, none of them twice: a second value for a key would be a second answer."""

    def __init__(self, rng: random.Random, words: WordLists | None) -> None:
        self._rng = rng
        self._words = words
        self._seen: set[str] = set()

    def __call__(self, kind: Kind) -> str:
        drawn = self._draw(kind)
        while drawn in self._seen:
            drawn = self._draw(kind)
        self._seen.add(drawn)
        return drawn

    def _draw(self, kind: Kind) -> str:
        if kind == "numbers":
            return str(self._rng.randint(10**6, 10**7 - 1))
        if kind == "uuids":
            return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
        assert self._words is not None
        return f"{self._rng.choice(self._words.adjectives)}-{self._rng.choice(self._words.nouns)}"


def _enumerate(keys: Sequence[str]) -> str:
    return f"{', '.join(keys[:-1])}, and {keys[-1]}" if len(keys) > 1 else keys[0]
