"""Finds registered chunk texts verbatim in a rendered prompt, so that any framework's prompt can be split into chunks.

Stands between the prompt and the engine: whoever writes a chunk registers its text, and every prompt is searched for
all of them at once. The texts themselves are not kept. A text is recognised in two steps: a rolling hash of its first
characters (the anchor) finds the places where it may start, and sha256 of the prompt's slice proves that it is there.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prophetkv_rag.store.base import TextEntry

logger = logging.getLogger(__name__)

LONG_ANCHOR = 32
"""Characters hashed into the anchor of a text that has at least as many."""
SHORT_ANCHOR = 8
"""Characters hashed into the anchor of a shorter text; texts shorter than this are never matched."""

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no character of the window is shifted out of the 64 bits
_DIGEST_COST = 500  # characters that sha256 reads in the time of one more digest and look-up
_MAX_COST = 100_000_000  # about a quarter of a second of searching, far beyond any prompt that is not made for it


@dataclass(frozen=True, slots=True)
class Match:
    """The registered text of `key` stands at `prompt[start:end]`."""

    start: int
    end: int
    key: str


def text_entry(text: str) -> TextEntry | None:
    """Describe a chunk's text so that `ChunkIndex` can find it.

    Args:
        text: The chunk; the unit that is registered and found is `text.strip()`.

    Returns:
        The entry, or `None` for a text shorter than 8 characters: it would be found all over a prompt, and there is
        nothing to gain from so few tokens.
    """
    stripped = text.strip()
    if len(stripped) < SHORT_ANCHOR:
        return None
    size = _anchor_size(len(stripped))
    anchor = int(_window_hashes(stripped[:size])[size][0])
    return TextEntry(anchor, len(stripped), hashlib.sha256(_utf8(stripped)).hexdigest())


class ChunkIndex:
    """The texts that can be recognised, each with the key of its cache. Safe to use from several threads.

    One text has one key; registering it again under another key replaces the first. One key may have several texts
    (a tokenizer that normalises its input gives them the same token ids).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lengths: dict[int, dict[int, dict[int, int]]] = {LONG_ANCHOR: {}, SHORT_ANCHOR: {}}
        """Anchor size -> anchor -> length -> number of texts: at most one digest per length at a place."""
        self._texts: dict[bytes, tuple[str, int, int]] = {}
        """Digest -> (key, anchor, length)."""
        self._digests: dict[str, set[bytes]] = {}
        """Key -> digests of its texts."""

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, key: str) -> bool:
        return key in self._digests

    def add(self, key: str, entry: TextEntry) -> None:
        """Register a text (idempotent; the last key wins)."""
        digest = bytes.fromhex(entry.digest)
        with self._lock:
            known = self._texts.get(digest)
            if known is None:
                lengths = self._lengths[_anchor_size(entry.length)].setdefault(entry.anchor, {})
                lengths[entry.length] = lengths.get(entry.length, 0) + 1
            elif known[0] != key:
                self._forget(known[0], digest)
            self._texts[digest] = (key, entry.anchor, entry.length)
            self._digests.setdefault(key, set()).add(digest)

    def remove(self, key: str) -> None:
        """Stop recognising the texts of `key`; nothing happens if there are none."""
        with self._lock:
            for digest in self._digests.pop(key, ()):
                _, anchor, length = self._texts.pop(digest)
                anchors = self._lengths[_anchor_size(length)]
                anchors[anchor][length] -= 1
                if not anchors[anchor][length]:
                    del anchors[anchor][length]
                if not anchors[anchor]:
                    del anchors[anchor]

    def find(self, prompt: str) -> list[Match]:
        """Find registered texts in `prompt`: from left to right, the longest at each place, without overlaps.

        Linear in the prompt, whatever the number of registered texts. A place where many registered texts begin alike
        costs one digest per distinct length; a prompt that is made to have very many such places is searched up to a
        fixed amount of work only, and the rest of it is then prefilled like any other text.
        """
        hashes = _window_hashes(prompt)
        matches: list[Match] = []
        with self._lock:
            search = _Search(prompt, self._texts)
            starts: dict[int, list[dict[int, int]]] = {}
            for size in (LONG_ANCHOR, SHORT_ANCHOR):  # texts with the long anchor are longer: they are tried first
                anchors = self._lengths[size]
                if anchors:
                    for start, anchor in enumerate(hashes[size].tolist()):
                        if anchor in anchors:
                            starts.setdefault(start, []).append(anchors[anchor])
            end = 0
            for start in sorted(starts):
                if start < end:
                    continue
                match = search.longest(start, starts[start])
                if match is not None:
                    matches.append(match)
                    end = match.end
                if search.cost > _MAX_COST:
                    logger.warning("searched %d of %d characters for known chunks, then gave up", start, len(prompt))
                    break
        return matches

    def _forget(self, key: str, digest: bytes) -> None:
        digests = self._digests[key]
        digests.discard(digest)
        if not digests:
            del self._digests[key]


class _Search:
    """One prompt's verification work; `cost` is what it has taken so far, in characters."""

    def __init__(self, prompt: str, texts: dict[bytes, tuple[str, int, int]]) -> None:
        self.cost = 0
        self._prompt = prompt
        self._texts = texts
        self._sorted: dict[int, list[int]] = {}

    def longest(self, start: int, groups: Iterable[dict[int, int]]) -> Match | None:
        """Longest registered text at `start`, of groups of lengths whose later ones are all shorter."""
        for group in groups:
            match = self._longest_of(start, self._in_order(group))
            if match is not None:
                return match
        return None

    def _longest_of(self, start: int, lengths: list[int]) -> Match | None:
        # The digests of all lengths come from one pass over the characters: sha256 of a prefix is a copy on the way.
        match = None
        sha256 = hashlib.sha256()
        hashed = start
        for length in lengths:
            end = start + length
            if end > len(self._prompt):
                break
            if self._prompt[end - 1].isspace():  # registered texts are stripped
                continue
            sha256.update(_utf8(self._prompt[hashed:end]))
            self.cost += end - hashed + _DIGEST_COST
            hashed = end
            known = self._texts.get(sha256.copy().digest())
            if known is not None:
                match = Match(start, end, known[0])
        return match

    def _in_order(self, group: dict[int, int]) -> list[int]:
        if len(group) == 1:
            return list(group)
        if id(group) not in self._sorted:
            self._sorted[id(group)] = sorted(group)
        return self._sorted[id(group)]


def _anchor_size(length: int) -> int:
    return LONG_ANCHOR if length >= LONG_ANCHOR else SHORT_ANCHOR


def _window_hashes(text: str) -> dict[int, NDArray[np.int64]]:
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


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # half of a surrogate pair is still a character of a Python string
