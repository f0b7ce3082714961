"""Counting words: the ten common words of a list (cwe) and the three frequent words of a coded text (fwe)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence

from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.ruler.haystack import word_runs
from prophetkv_rag.evaluation.tasks.ruler.settings import TaskSettings
from prophetkv_rag.evaluation.tasks.ruler.words import word_lists

CWE_BEFORE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_QUESTION = "What are the 10 most common words in the above list?"
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
NUM_COMMON = 10

FWE_BEFORE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
FWE_QUESTION = "What are the three most frequently appeared words in the above coded text?"
FWE_AFTER = f"\nQuestion: Do not provide any explanation. Please ignore the dots '....'. {FWE_QUESTION}"
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
ZETA_2 = math.pi**2 / 6


class CommonWords:
    """cwe behind one worked example; a size counts different words."""

    min_size = 2 * NUM_COMMON
    num_available: int | None = None

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings
        self._words = word_lists().all
        self.max_size: int | None = len(self._words)
        short = settings.max_seq_length < 4096
        self._repeats = (6, 1) if short else (30, 3)
        self._example_size = 20 if short else 40
        self._example_repeats = (3, 1) if short else (10, 3)

    def build(self, index: int, size: int) -> TaskExample:
        """Return sample `index` with `size` different words."""
        rng = self.settings.rng(index)
        example, common = self._numbered(self._draw(rng, self._example_size), self._example_repeats)
        answers = " ".join(_number(common))
        shown = f"{CWE_BEFORE}{' '.join(example)}\nQuestion: {CWE_QUESTION}{CWE_PREFIX} {answers}\n"
        listed, common = self._numbered(self._draw(rng, size), self._repeats)
        return TaskExample(
            task=self.settings.task,
            example_id=self.settings.example_id(index),
            before=shown + CWE_BEFORE,
            context=word_runs(listed),
            after=f"\nQuestion: {CWE_QUESTION}",
            query=CWE_QUESTION,
            answer_prefix=CWE_PREFIX,
            references=tuple(common),
            metric="string_match_all",
            max_new_tokens=120,
        )

    def _draw(self, rng: random.Random, size: int) -> list[str]:
        # All words are shuffled whatever the size, so that a larger sample holds the smaller one.
        words = list(self._words)
        rng.shuffle(words)
        return words[:size]

    def _numbered(self, words: list[str], repeats: tuple[int, int]) -> tuple[list[str], list[str]]:
        common, others = words[:NUM_COMMON], words[NUM_COMMON:]
        listed = common * repeats[0] + others * repeats[1]
        self.settings.shuffle(listed)
        return _number(listed), common


class FrequentWords:
    """fwe: random words whose counts fall with the square of their rank, the first of them noise.

    A size is the number N of draws: rank k occurs int(N / (zeta(2) k^2)) times.
    """

    min_size = 74
    """From here on rank 4, the last answer, is more frequent than rank 5: N (1/16 - 1/25) / zeta(2) is above 1."""
    max_size: int | None = None
    num_available: int | None = None

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings
        self._vocabulary_size = max(4, (settings.max_seq_length - 50) // 50)

    def build(self, index: int, size: int) -> TaskExample:
        """Return sample `index` of `size` draws."""
        vocabulary = ["...", *self._coded_words(self.settings.rng(index))]
        text = [word for rank, word in enumerate(vocabulary, start=1) for _ in range(int(size / ZETA_2 / rank**2))]
        self.settings.shuffle(text)
        return TaskExample(
            task=self.settings.task,
            example_id=self.settings.example_id(index),
            before=FWE_BEFORE,
            context=word_runs(text),
            after=FWE_AFTER,
            query=FWE_QUESTION,
            answer_prefix=FWE_PREFIX,
            references=tuple(vocabulary[1:4]),
            metric="string_match_all",
            max_new_tokens=50,
        )

    def _coded_words(self, rng: random.Random) -> list[str]:
        words: dict[str, None] = {}
        while len(words) < self._vocabulary_size - 1:
            words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        return list(words)


def _number(words: Sequence[str]) -> list[str]:
    return [f"{number}. {word}" for number, word in enumerate(words, start=1)]
