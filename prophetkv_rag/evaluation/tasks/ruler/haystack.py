"""Texts that needles are hidden in, and how units become the pieces of a context.

Separators belong to the pieces so that concatenation gives the context. A space leads the unit behind it and a newline
ends the unit before it: that is where tokenizers put them, so a chunk that starts at a piece has natural tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from prophetkv_rag.defaults import read_speeches
from prophetkv_rag.errors import InputError

NOISE_LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_SENTENCE_END = re.compile(r"""[.!?]["'\u201d\u2019)\]]*$""")
_ABBREVIATION = re.compile(r"^\W*(?:(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|No|Gen|Sen|Rep|Gov)|(?:[A-Za-z]\.)*[A-Za-z])\.$")


def essay_words(path: Path | None) -> list[str]:
    """Return the words of a text file, or of the shipped speeches in order of their names."""
    if path is None:
        return " ".join(read_speeches().values()).split()
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"essay_path: cannot read {path} as UTF-8 text: {error}"
        raise InputError(msg) from error
    if not words:
        msg = f"essay_path: {path} holds no words; give a text of prose"
        raise InputError(msg)
    return words


def first_words(words: Sequence[str], number: int) -> list[str]:
    """Return the first words of a text, which is repeated where it is too short."""
    repeats = -(-number // len(words))
    return (list(words) * repeats)[:number]


def split_sentences(words: Sequence[str]) -> list[str]:
    """Cut words into sentences, each joined by spaces.

    A sentence ends at a word with `.`, `!` or `?` at its end (closing quotes and brackets may follow), unless the word
    is an abbreviation (a title, or single letters with points) or the next word holds no letter or digit or starts in
    lower case.
    """
    sentences: list[str] = []
    start = 0
    for position, (word, following) in enumerate(pairwise(words), start=1):
        if _SENTENCE_END.search(word) and not _ABBREVIATION.match(word) and _opens_sentence(following):
            sentences.append(" ".join(words[start:position]))
            start = position
    sentences.append(" ".join(words[start:]))
    return sentences


def _opens_sentence(word: str) -> bool:
    first = next((character for character in word if character.isalnum()), None)
    return first is not None and not first.islower()


def insert_units(units: Sequence[str], positions: Sequence[int], needles: Sequence[str]) -> list[str]:
    """Return the units with each needle before the unit its position names; positions count the units alone, sorted."""
    result = list(units)
    for position, needle in reversed(list(zip(positions, needles, strict=True))):
        result.insert(position, needle)
    return result


def lines_to_pieces(units: Sequence[str], separator: str = "\n") -> tuple[str, ...]:
    """Return the units, each but the last with the separator at its end."""
    return (*(unit + separator for unit in units[:-1]), units[-1])


def spaced_to_pieces(units: Sequence[str]) -> tuple[str, ...]:
    """Return the units, each but the first with a space before it."""
    return (units[0], *(f" {unit}" for unit in units[1:]))


def word_runs(words: Sequence[str], length: int = 16) -> tuple[str, ...]:
    """Return pieces of `length` words; short enough (about 80 tokens) to be joined to chunks of any usual size."""
    runs = [" ".join(words[start : start + length]) for start in range(0, len(words), length)]
    return spaced_to_pieces(runs)
