"""A prompt as people read it: its text token by token, what was reused, what was recomputed, and each token's score.

A prefill leaves behind a few small arrays (`PromptView`'s arguments); they become text only when somebody looks, so
that showing costs nothing on the way to the first token. No tensor, no cache and no model is kept alive by a view.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prophetkv_rag.once import once

SegmentKind = Literal["prefix", "chunk", "glue", "suffix"]

SHADES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Quantiles of the scores at which the next stronger shade begins: most tokens stay pale, the top 2% stand out."""


@dataclass(frozen=True, slots=True)
class ViewedChunk:
    """Where a chunk stands in the prompt: tokens `start` to `stop`; `status` as in `ChunkReport`."""

    key: str
    start: int
    stop: int
    status: str


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token: its text, its stage-I score (`None` where none was computed), and whether it was recomputed.

    A character of several tokens is the text of its last one; the others' is empty. `recomputed` is said of tokens in
    chunks and former messages only: everything else is computed anyway.
    """

    text: str
    score: float | None
    recomputed: bool


@dataclass(frozen=True, slots=True)
class SegmentView:
    """A stretch of the prompt.

    Attributes:
        kind: `"chunk"`, or what stands before the first (`"prefix"`), between two (`"glue"`) and after the last one
            (`"suffix"`; a prompt without chunks is one suffix).
        text: Its tokens' text, special tokens included.
        key: A chunk's cache key; else `None`.
        status: A chunk's status, as in `ChunkReport`; for what stands outside chunks `"fresh"`, or `"remembered"` where
            it was taken over from a former prompt and its answer, or `"moved"` where it stood elsewhere in those.
        tokens: Their texts, joined, are `text`.
    """

    kind: SegmentKind
    text: str
    key: str | None
    status: str
    tokens: tuple[TokenView, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "kind": self.kind,
            "key": self.key,
            "status": self.status,
            "text": self.text,
            "tokens": [
                {"text": token.text, "score": token.score, "recomputed": token.recomputed} for token in self.tokens
            ],
        }


class PromptView:
    """What one prefill did to its prompt; `segments` is computed at the first look.

    Attributes:
        token_ids: `[N]`, int64: the prompt.
        chunks: The chunks in order of position.
        scores: `[N]`, fp32: stage I's scores, or `None` where the strategy ran no stage I.
        recomputed: Ascending positions of the chunk tokens that ran through every layer at query time.
        num_remembered: How many of the first tokens were taken over from a former prompt and its answer.
        moved: Where tokens stand, from and up to, that were found elsewhere in a former prompt and its answer.
    """

    def __init__(
        self,
        token_ids: NDArray[np.int64],
        chunks: Sequence[ViewedChunk],
        scores: NDArray[np.float32] | None,
        recomputed: NDArray[np.int64],
        tokenizer: Any,
        num_remembered: int = 0,
        moved: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.moved = tuple(moved)
        self.num_remembered = num_remembered
        self.token_ids = token_ids
        self.chunks = tuple(chunks)
        self.scores = scores
        self.recomputed = recomputed
        self._tokenizer = tokenizer

    def __repr__(self) -> str:
        return f"PromptView({len(self.token_ids)} tokens, {len(self.chunks)} chunks)"

    @once
    def segments(self) -> tuple[SegmentView, ...]:
        """The prompt from its first token to its last."""
        recomputed = np.zeros(len(self.token_ids), dtype=bool)
        recomputed[self.recomputed] = True
        found, cursor = list[SegmentView](), 0
        for chunk in self.chunks:
            found += self._outside("glue" if cursor else "prefix", cursor, chunk.start, recomputed)
            found.append(self._segment("chunk", chunk.start, chunk.stop, chunk, recomputed))
            cursor = chunk.stop
        found += self._outside("suffix", cursor, len(self.token_ids), recomputed)
        return tuple(found)

    def _outside(
        self, kind: SegmentKind, start: int, stop: int, recomputed: NDArray[np.bool_]
    ) -> Iterator[SegmentView]:
        """Yield what stands outside chunks, in several where it came to be in several ways."""
        edges = {self.num_remembered, *(edge for span in self.moved for edge in span)}
        cuts = [start, *sorted(edge for edge in edges if start < edge < stop), stop]
        for first, last in pairwise(cuts):
            if last > first:
                yield self._segment(kind, first, last, None, recomputed)

    def _segment(
        self, kind: SegmentKind, start: int, stop: int, chunk: ViewedChunk | None, recomputed: NDArray[np.bool_]
    ) -> SegmentView:
        pieces = token_texts(self._decode, [int(token) for token in self.token_ids[start:stop]])
        has_scores = chunk is not None and self.scores is not None
        tokens = tuple(
            TokenView(text, float(self.scores[row]) if has_scores else None, bool(recomputed[row]))  # type: ignore[index]
            for row, text in enumerate(pieces, start)
        )
        is_moved = any(first <= start < last for first, last in self.moved)
        outside = "remembered" if start < self.num_remembered else "moved" if is_moved else "fresh"
        key, status = (None, outside) if chunk is None else (chunk.key, chunk.status)
        return SegmentView(kind, "".join(pieces), key, status, tokens)

    def _decode(self, token_ids: Sequence[int]) -> str:
        if self._tokenizer is None:  # prompts of token ids only
            return "".join(f"<{token}>" for token in token_ids)
        return str(
            self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    @once
    def _shade_limits(self) -> list[float]:
        """The scores at which shades begin."""
        if self.scores is None or not self.chunks:
            return []
        scores = np.concatenate([self.scores[chunk.start : chunk.stop] for chunk in self.chunks])
        return [float(limit) for limit in np.quantile(scores, SHADES)]

    def shade(self, score: float | None) -> int:
        """Return how strongly a token of this score is drawn, from 0 to `len(SHADES)`, by its rank in this prompt."""
        return 0 if score is None or score <= 0 else bisect_right(self._shade_limits, score)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the segments with their tokens."""
        return {"segments": [segment.to_dict() for segment in self.segments]}


def token_texts(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]) -> list[str]:
    """Return each token's text; joined, they are `decode(token_ids)`.

    Tokens are decoded together with the one before, because decoders treat a text's start in a way of its own, and a
    character whose bytes are spread over several tokens shows with the last of them.
    """
    pieces: list[str] = []
    context = shown = 0  # tokens from `context` are decoded; those before `shown` have been given their text
    before = ""
    for end in range(1, len(token_ids) + 1):
        now = decode(token_ids[context:end])
        if now.endswith("\ufffd") and end < len(token_ids):  # perhaps the first bytes of a character
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        context, shown = shown, end
        before = decode(token_ids[context:shown])
    whole = decode(token_ids)
    return pieces if "".join(pieces) == whole else _by_prefixes(decode, token_ids, whole)


def _by_prefixes(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int], whole: str) -> list[str]:
    """Same for a decoder whose text of a token depends on more than its neighbour: slower, never wrong in the sum."""
    pieces, shown = [], 0
    for end in range(1, len(token_ids)):
        now = decode(token_ids[:end])
        same = next((at for at, pair in enumerate(zip(now, whole, strict=False)) if pair[0] != pair[1]), None)
        reached = max(shown, min(len(now), len(whole)) if same is None else same)
        pieces.append(whole[shown:reached])
        shown = reached
    return [*pieces, whole[shown:]] if token_ids else []
