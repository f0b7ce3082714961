"""English words from wonderwords (MIT), the package RULER takes them from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from prophetkv_rag.extras import needs


@dataclass(frozen=True, slots=True)
class WordLists:
    """Sorted words without repetition; a few hold a space or a hyphen."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    all: tuple[str, ...]


@cache
def word_lists() -> WordLists:
    """Load the nouns, the adjectives, and these with the verbs.

    Raises:
        MissingExtraError: If wonderwords is not installed.
    """
    with needs("bench", "wonderwords", what="this RULER task"):
        from wonderwords import Defaults, RandomWord
    source = RandomWord(
        enhanced_prefixes=False, noun=Defaults.NOUNS, adjective=Defaults.ADJECTIVES, verb=Defaults.VERBS
    )
    nouns, adjectives, verbs = (
        source.filter(include_categories=[category]) for category in ("noun", "adjective", "verb")
    )
    return WordLists(tuple(sorted(nouns)), tuple(sorted(adjectives)), tuple(sorted({*nouns, *adjectives, *verbs})))
