"""A rolling hash of characters: what a text begins with, and what every window of a prompt is, in numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LONG_ANCHOR = 32
"""Characters hashed into the anchor of a text that has at least as many."""
SHORT_ANCHOR = 8
"""Characters hashed into the anchor of a shorter text; texts shorter than this are never matched."""

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no character of the window is shifted out of the 64 bits


def anchor_size(length: int) -> int:
    """Return how many characters of a text of this length are hashed."""
    return LONG_ANCHOR if length >= LONG_ANCHOR else SHORT_ANCHOR


def window_hashes(text: str) -> dict[int, NDArray[np.int64]]:
    """Polynomial hash (mod 2^64) of every window of 8 and of 32 characters, by doubling the window: 1, 2, 4, ...

    Returns:
        Window size -> `[max(len(text) - size + 1, 0)]`, int64 (SQLite has no unsigned integers).
    """
    hashes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    found: dict[int, NDArray[np.int64]] = {}
    width = 1
    while width < LONG_ANCHOR:
        shift = np.uint64(pow(_MULTIPLIER, width, 1 << 64))
        hashes = hashes[:-width] * shift + hashes[width:]
        width *= 2
        if width in (SHORT_ANCHOR, LONG_ANCHOR):
            found[width] = hashes.view(np.int64)
    return found
