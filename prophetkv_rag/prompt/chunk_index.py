"""Finds registered chunk texts verbatim in a rendered prompt, so that any framework's prompt can be split into chunks.

Stands between the prompt and the engine: whoever writes a chunk registers its text, and every prompt is searched for
all of them at once. The texts themselves are not kept. A text is recognised in two steps: a rolling hash of its first
characters (the anchor) finds the places where it may start, and sha256 of the prompt's slice proves that it is there.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from prophetkv_rag.forks import around_fork
from prophetkv_rag.prompt.rolling_hash import LONG_ANCHOR, SHORT_ANCHOR, anchor_size, window_hashes
from prophetkv_rag.store import EntryColumns, TextEntry

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32
_DIGEST_COST = 500  # characters that sha256 reads in the time of one more digest and look-up
_MAX_COST = 100_000_000  # about a quarter of a second of searching, far beyond any prompt that is not made for it


_Lengths = int | dict[int, int]
"""The length of the only text that begins with an anchor, or for several texts length -> number of texts."""


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
    size = anchor_size(len(stripped))
    anchor = int(window_hashes(stripped[:size])[size][0])
    return TextEntry(anchor, len(stripped), hashlib.sha256(_utf8(stripped)).hexdigest())


class ChunkIndex:
    """The texts that can be recognised, each with the key of its cache. Safe to use from several threads.

    One text has one key; registering it again under another key replaces the first. One key may have several texts
    (a tokenizer that normalises its input gives them the same token ids).
    """

    def __init__(self) -> None:
        # Numbers, strings and bytes rather than containers wherever there is one of a kind: the garbage collector would
        # walk 100,000 containers again and again while they are made.
        self._lock = threading.Lock()
        around_fork(self, "_lock")
        self._anchors: dict[int, dict[int, _Lengths]] = {LONG_ANCHOR: {}, SHORT_ANCHOR: {}}
        """Anchor size -> anchor -> lengths of the texts that begin so: at most one digest per length at a place."""
        self._texts: dict[bytes, str] = {}
        """Digest -> key."""
        self._begins: dict[bytes, int] = {}
        """Digest -> anchor."""
        self._sizes: dict[bytes, int] = {}
        """Digest -> length."""
        self._digests: dict[str, bytes | set[bytes]] = {}
        """Key -> digest of its text, or of all its texts."""

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, key: object) -> bool:
        return key in self._digests

    def add(self, key: str, entry: TextEntry) -> None:
        """Register a text (idempotent; the last key wins)."""
        with self._lock:
            self._add(key, bytes.fromhex(entry.digest), entry.anchor, entry.length)

    def load(self, columns: EntryColumns) -> None:
        """Register many texts, as `add` would one by one; into an empty index that takes a fraction of the time."""
        joined = bytes.fromhex("".join(columns.digests))
        digests = [joined[start : start + _DIGEST_BYTES] for start in range(0, len(joined), _DIGEST_BYTES)]
        texts = dict(zip(digests, columns.keys, strict=True))
        with self._lock:
            if self._texts or not len(texts) == len(digests) == len(set(columns.keys)):
                for key, digest, anchor, length in zip(
                    columns.keys, digests, columns.anchors, columns.lengths, strict=True
                ):
                    self._add(key, digest, anchor, length)
                return
            self._texts.update(texts)
            self._begins.update(zip(digests, columns.anchors, strict=True))
            self._sizes.update(zip(digests, columns.lengths, strict=True))
            self._digests.update(zip(columns.keys, digests, strict=True))
            for size, table in self._anchors.items():
                places = [
                    (anchor, length)
                    for anchor, length in zip(columns.anchors, columns.lengths, strict=True)
                    if anchor_size(length) == size
                ]
                table.update(places)
                if len(table) < len(places):
                    _tell_apart(table, places)

    def remove(self, key: str) -> None:
        """Stop recognising the texts of `key`; nothing happens if there are none."""
        with self._lock:
            found = self._digests.pop(key, ())
            for digest in (found,) if isinstance(found, bytes) else found:
                self._texts.pop(digest)
                length = self._sizes.pop(digest)
                _forget_length(self._anchors[anchor_size(length)], self._begins.pop(digest), length)

    def find(self, prompt: str) -> list[Match]:
        """Find registered texts in `prompt`: from left to right, the longest at each place, without overlaps.

        Linear in the prompt, whatever the number of registered texts. A place where many registered texts begin alike
        costs one digest per distinct length; a prompt that is made to have very many such places is searched up to a
        fixed amount of work only, and the rest of it is then prefilled like any other text.
        """
        hashes = window_hashes(prompt)
        matches: list[Match] = []
        with self._lock:
            search = _Search(prompt, self._texts)
            starts: dict[int, list[_Lengths]] = {}
            for size in (LONG_ANCHOR, SHORT_ANCHOR):  # texts with the long anchor are longer: they are tried first
                anchors = self._anchors[size]
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

    def _add(self, key: str, digest: bytes, anchor: int, length: int) -> None:
        known = self._texts.get(digest)
        if known == key:
            return
        if known is None:
            _note_length(self._anchors[anchor_size(length)], anchor, length)
            self._begins[digest], self._sizes[digest] = anchor, length
        else:
            self._forget(known, digest)
        self._texts[digest] = key
        digests = self._digests.get(key)
        if digests is None:
            self._digests[key] = digest
        elif isinstance(digests, bytes):
            self._digests[key] = {digests, digest}
        else:
            digests.add(digest)

    def _forget(self, key: str, digest: bytes) -> None:
        digests = self._digests[key]
        if isinstance(digests, set):
            digests.discard(digest)
        if isinstance(digests, bytes) or not digests:
            del self._digests[key]


class _Search:
    """One prompt's verification work; `cost` is what it has taken so far, in characters."""

    def __init__(self, prompt: str, texts: dict[bytes, str]) -> None:
        self.cost = 0
        self._prompt = prompt
        self._texts = texts
        self._sorted: dict[int, list[int]] = {}

    def longest(self, start: int, groups: Iterable[_Lengths]) -> Match | None:
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
                match = Match(start, end, known)
        return match

    def _in_order(self, group: _Lengths) -> list[int]:
        if isinstance(group, int):
            return [group]
        if id(group) not in self._sorted:
            self._sorted[id(group)] = sorted(group)
        return self._sorted[id(group)]


def _note_length(table: dict[int, _Lengths], anchor: int, length: int) -> None:
    lengths = table.get(anchor)
    if lengths is None:
        table[anchor] = length
        return
    if isinstance(lengths, int):
        lengths = table[anchor] = {lengths: 1}
    lengths[length] = lengths.get(length, 0) + 1


def _forget_length(table: dict[int, _Lengths], anchor: int, length: int) -> None:
    lengths = table[anchor]
    if isinstance(lengths, dict):
        lengths[length] -= 1
        if not lengths[length]:
            del lengths[length]
    if isinstance(lengths, int) or not lengths:
        del table[anchor]


def _tell_apart(table: dict[int, _Lengths], places: list[tuple[int, int]]) -> None:
    """Note every text of the anchors that several have; the table has one length for each anchor."""
    shared = {anchor for anchor, count in Counter(anchor for anchor, _ in places).items() if count > 1}
    for anchor in shared:
        del table[anchor]
    for anchor, length in places:
        if anchor in shared:
            _note_length(table, anchor, length)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # half of a surrogate pair is still a character of a Python string
