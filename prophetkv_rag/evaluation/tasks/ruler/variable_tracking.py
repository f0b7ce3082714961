"""Variable tracking (vt): a chain of assignments hidden in noise; which variables end up with the value?"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from itertools import pairwise

from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.ruler.fitting import largest_size
from prophetkv_rag.evaluation.tasks.ruler.haystack import NOISE_LINE, insert_units, lines_to_pieces
from prophetkv_rag.evaluation.tasks.ruler.settings import TaskSettings
from prophetkv_rag.once import once

BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = "Find all variables that are assigned the value {query} in the text above."
ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned "
    "the value {query}, they are: "
)
NUM_VARIABLES = 5
EXAMPLE_TOKENS = 500
"""Most tokens of the in-context example, its answer not included; it has 5 lines of noise even where that is more."""


class VariableTracking:
    """One chain of four hops behind one worked example; a size counts lines of noise."""

    min_size = 5
    max_size: int | None = None
    num_available: int | None = None

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings

    @once
    def _example_size(self) -> int:
        """Lines of noise in the worked example; by a tokenizer, which a task that is only made need not have."""
        return largest_size(self._example_fits, self.min_size)

    def build(self, index: int, size: int) -> TaskExample:
        """Return sample `index` in `size` lines of noise."""
        rng = self.settings.rng(index)
        example, names = self._example(rng, self._example_size)
        prompt = example.before + "".join(example.context) + example.after + example.answer_prefix
        shown = f"{prompt} {' '.join(names)}\n\n"
        names, value = _names(rng, 5), str(rng.randint(10000, 99998))
        return self._prompt(index, names, value, size, rng, before=shown + BEFORE)

    def _example(self, rng: random.Random, size: int) -> tuple[TaskExample, list[str]]:
        """Return the worked example and its answers: new names for every sample, in one layout, as in RULER."""
        names, value = _names(rng, 3), str(rng.randint(10000, 99998))
        layout = self.settings.rng("example")
        return self._prompt(-1, names, value, size, layout, before=BEFORE, chat=False), names

    def _example_fits(self, size: int) -> bool:
        example, _ = self._example(self.settings.rng("example names"), size)
        return self.settings.count_tokens(example) <= EXAMPLE_TOKENS

    def _prompt(
        self,
        index: int,
        names: Sequence[str],
        value: str,
        size: int,
        rng: random.Random,
        *,
        before: str,
        chat: bool = True,
    ) -> TaskExample:
        # RULER's trailing space: every assignment from a variable has one.
        hops = [f"VAR {name} = VAR {source} " for source, name in pairwise(names)]
        positions = sorted(rng.sample(range(size), NUM_VARIABLES))
        lines = insert_units([NOISE_LINE] * size, positions, [f"VAR {names[0]} = {value}", *hops])
        question = QUESTION.format(query=value)
        return TaskExample(
            task=self.settings.task,
            example_id=self.settings.example_id(index),
            before=before,
            context=lines_to_pieces(lines),
            after=f"\nQuestion: {question}",
            query=question,
            answer_prefix=ANSWER_PREFIX.format(query=value),
            references=tuple(names),
            metric="string_match_all",
            max_new_tokens=30,
            chat=chat,
        )


def _names(rng: random.Random, letters: int) -> list[str]:
    """Draw distinct names of capital letters, in chain order."""
    names: list[str] = []
    while len(names) < NUM_VARIABLES:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in (*names, "VAR"):
            names.append(name)
    return names
