"""Which chunks each chunk is put behind when it is encoded: those that the caller names, or that came with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prophetkv_rag.config import Encoding
from prophetkv_rag.store import ALONE, Behind, ChunkStore


class Placing:
    """Chooses, by an encoding, among what the store knows.

    Args:
        encoding: How many chunks, and of which kind.
        store: Knows the chunks.
        tried: Calls a method of the store, or returns `otherwise` where that fails.
        key_of: Returns the key of a chunk's text.
    """

    def __init__(
        self, encoding: Encoding, store: ChunkStore, tried: Callable[..., Any], key_of: Callable[[str], str]
    ) -> None:
        self._encoding = encoding
        self._store = store
        self._tried = tried
        self._key_of = key_of

    def before(
        self,
        texts: Sequence[str | Sequence[int]],
        keys: Sequence[str],
        behind: Sequence[Sequence[str]] | None,
        *,
        as_neighbours: bool,
    ) -> dict[str, tuple[str, ...]]:
        """Return, for each chunk that is encoded behind others, their keys; those that the store does not know are not.

        Chunks of one call follow each other in one document, where the caller does not say what they stand behind.

        Args:
            texts: The chunks.
            keys: Of the same.
            behind: For each, the texts before it, the last one right before it.
            as_neighbours: Whether these are its nearest neighbours: for chunks that are their whole document, where
                the encoding puts others behind what comes before them.
        """
        count = self._encoding.num_neighbours if as_neighbours else self._encoding.count
        if not count:
            return {}
        if behind is not None:
            known = {text: key for text, key in zip(texts, keys, strict=True) if isinstance(text, str)}
            found = [[known.get(text) or self._key_of(text) for text in before] for before in behind]
        elif self._encoding.kind == "previous" and self._encoding.is_order_guessed:
            found = [list(keys[max(0, number - count) : number]) for number in range(len(keys))]
        else:
            return {}
        own = set(keys)
        others = {key for before in found for key in before} - own
        nothing: set[str] = set()
        there = self._tried(self._store.known, others, otherwise=nothing)
        in_order = self.in_order(keys) if as_neighbours else nothing
        before: dict[str, tuple[str, ...]] = {}
        for key, candidates in zip(keys, found, strict=True):
            chosen = [one for one in candidates if one != key and (one in own or one in there)]
            if chosen and key not in before and key not in in_order:
                before[key] = tuple(dict.fromkeys(chosen))[-count:]
        return before

    def is_wanted_anew(self, key: str, before: Sequence[str], refresh: bool) -> bool:
        """Whether a chunk is stored alone; with `refresh` also if most of what it stands behind is not in `before`."""
        there = self._behind(key).keys
        return 2 * len(set(before).intersection(there)) < len(before) if refresh else not there

    def in_order(self, keys: Sequence[str]) -> set[str]:
        """Return those that stand before or behind others of their document, where the encoding asks for that."""
        if self._encoding.kind != "previous":
            return set()
        nothing: set[str] = set()
        followed = self._tried(self._store.followed, keys, otherwise=nothing)
        chained = {key for key in keys if (behind := self._behind(key)).keys and behind.is_chained}
        return chained.union(followed)

    def _behind(self, key: str) -> Behind:
        found: Behind = self._tried(self._store.behind, key, otherwise=ALONE)
        return found
