"""Finds registered chunks in a prompt's token ids, for prompts that somebody else has tokenised.

Where a chunk meets its neighbours a tokenizer may have put tokens together differently than in the chunk alone, so up
to `EDGE` tokens at each end may differ: what is found then is the chunk's interior, which is the same in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EDGE = 4
"""Tokens at each end of a chunk that need not be the same."""
WINDOW = 8
"""Tokens that are hashed: those behind the first `EDGE`."""
SHORTEST = 2 * EDGE + WINDOW
"""Chunks of fewer tokens are not found: there is nothing to gain from them."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MAX_COMPARISONS = 1_000_000  # tokens compared in vain for one prompt, far beyond any that is not made for it


@dataclass(frozen=True, slots=True)
class TokenMatch:
    """Tokens `[skipped : skipped + stop - start]` of the chunk `key` stand at `prompt[start:stop]`."""

    key: str
    start: int
    stop: int
    skipped: int


class TokenIndex:
    """The chunks that can be recognised; for one thread."""

    def __init__(self) -> None:
        self._anchors: dict[int, list[str]] = {}
        self._ids: dict[str, NDArray[np.int32]] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, key: str) -> bool:
        return key in self._ids

    def num_tokens(self, key: str) -> int:
        """Tokens of a known chunk."""
        return len(self._ids[key])

    def ids(self, key: str) -> list[int]:
        """Token ids of a known chunk."""
        found: list[int] = self._ids[key].tolist()
        return found

    def add(self, key: str, input_ids: Sequence[int]) -> None:
        """Know a chunk (idempotent); nothing happens for one that is too short to be found."""
        if len(input_ids) < SHORTEST or key in self._ids:
            return
        ids = np.asarray(input_ids, dtype=np.int32)
        self._ids[key] = ids
        self._anchors.setdefault(_anchor(ids), []).append(key)

    def remove(self, key: str) -> None:
        """Forget a chunk; nothing happens if it is not known."""
        ids = self._ids.pop(key, None)
        if ids is None:
            return
        keys = self._anchors[_anchor(ids)]
        keys.remove(key)
        if not keys:
            del self._anchors[_anchor(ids)]

    def find(self, prompt: Sequence[int]) -> list[TokenMatch]:
        """Find chunks in a prompt: from left to right, the longest at each place, without overlaps."""
        ids = np.asarray(prompt, dtype=np.int32)
        if not self._ids or len(ids) < SHORTEST - EDGE:
            return []
        matches: list[TokenMatch] = []
        end = cost = 0
        for place, anchor in enumerate(_window_hashes(ids).tolist()):
            if place < end or anchor not in self._anchors:
                continue
            found = [match for key in self._anchors[anchor] if (match := _match(key, self._ids[key], ids, place, end))]
            cost += sum(len(self._ids[key]) for key in self._anchors[anchor]) * (not found)
            if found:
                matches.append(max(found, key=lambda match: match.stop - match.start))
                end = matches[-1].stop
            if cost > _MAX_COMPARISONS:
                break
        return matches


def _match(key: str, chunk: NDArray[np.int32], prompt: NDArray[np.int32], place: int, begin: int) -> TokenMatch | None:
    """Match a chunk whose window may stand at `place`, with nothing before `begin`."""
    first = place - EDGE  # where the whole chunk would begin
    skipped = max(0, begin - first)
    if skipped > EDGE:
        return None
    length = min(len(chunk), len(prompt) - first)
    differs = np.flatnonzero(chunk[skipped:length] != prompt[first + skipped : first + length]) + skipped
    before = differs[differs < EDGE]
    after = differs[differs >= EDGE]
    skipped = int(before[-1]) + 1 if len(before) else skipped
    stop = int(after[0]) if len(after) else length
    if stop < len(chunk) - EDGE:
        return None
    return TokenMatch(key, first + skipped, first + stop, skipped)


def _anchor(ids: NDArray[np.int32]) -> int:
    return int(_window_hashes(ids[EDGE : EDGE + WINDOW])[0])


def _window_hashes(ids: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Polynomial hash (mod 2^64) of every window."""
    hashes = np.zeros(max(0, len(ids) - WINDOW + 1), dtype=np.uint64)
    for offset in range(WINDOW):
        hashes = hashes * _MULTIPLIER + ids[offset : offset + len(hashes)].astype(np.uint64)
    return hashes
