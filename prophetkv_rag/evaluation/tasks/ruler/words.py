"""English words from wonderwords (MIT), the package RULER takes them from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from prophetkv_rag.errors import InputError


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
        InputError: If wonderwords is not installed.
    """
    try:
        from wonderwords import Defaults, RandomWord
    except ImportError as error:
        msg = "this RULER task draws its words from wonderwords: pip install 'prophetkv_rag[bench]'"
        raise InputError(msg) from error
    source = RandomWord(
        enhanced_prefixes=False, noun=Defaults.NOUNS, adjective=Defaults.ADJECTIVES, verb=Defaults.VERBS
    )
    nouns, adjectives, verbs = (
        source.filter(include_categories=[category]) for category in ("noun", "adjective", "verb")
    )
    return WordLists(tuple(sorted(nouns)), tuple(sorted(adjectives)), tuple(sorted({*nouns, *adjectives, *verbs})))
