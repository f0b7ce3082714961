"""The caches of a prompt's chunks, as far as they do not stand in what is taken over from a former prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from prophetkv_rag.chunks import ChunkLibrary, Origin
from prophetkv_rag.config import ALONE_RATIO, BEHIND_RATIO, FirstChunk
from prophetkv_rag.prompt import PromptLayout
from prophetkv_rag.reuse.continuing import Continuation
from prophetkv_rag.store import ChunkCache


def load_new(
    continued: Continuation,
    layout: PromptLayout,
    library: ChunkLibrary,
    model_lock: AbstractContextManager[Any],
    first_chunk: FirstChunk,
) -> tuple[Sequence[ChunkCache], Sequence[Origin], bool]:
    """Load the chunks that are not taken over; see `ChunkLibrary.load`.

    Returns:
        Their caches, where each came from, and whether the prompt's first chunk, loaded or taken over, is exact.
    """
    chunks = continued.new_chunks(layout)
    is_first_new = len(chunks) == len(layout.chunks)
    caches: Sequence[ChunkCache] = []
    origins: Sequence[Origin] = []
    is_exact = False
    if chunks:
        wanted = first_chunk if is_first_new else "cached"
        found = library.load(replace(layout, chunks=chunks), model_lock=model_lock, first_chunk=wanted)
        caches, origins, is_exact = found
    if not is_first_new:
        is_exact = layout.exact_first_chunk and continued.was_alone(layout.chunks[0])
    return caches, origins, is_exact


def default_ratio(
    continued: Continuation, layout: PromptLayout, caches: Sequence[ChunkCache], *, has_exact_first: bool
) -> float:
    """Return the share that is recomputed where nobody says: of a prompt's chunks, by how each was encoded.

    Args:
        continued: Knows how those were that are taken over.
        layout: The prompt.
        caches: Of the others.
        has_exact_first: Whether the first chunk is exact, or made so.
    """
    num_held = len(layout.chunks) - len(caches)
    is_alone = [continued.was_alone(chunk) for chunk in layout.chunks[:num_held]]
    is_alone += [not cache.behind.keys for cache in caches]
    moved = sum(span.stop - span.start for span in layout.moved)  # computed behind others, as what else was said
    tokens = [len(chunk.input_ids) for chunk in layout.chunks]
    return ratio_by_encoding(tokens, is_alone, has_exact_first=has_exact_first, moved_tokens=moved)


def ratio_by_encoding(
    tokens: Sequence[int], is_alone: Sequence[bool], *, has_exact_first: bool, moved_tokens: int = 0
) -> float:
    """Return the share that is recomputed by default.

    Args:
        tokens: Of each chunk.
        is_alone: Whether each was encoded alone.
        has_exact_first: Whether the first one is exact, or made so.
        moved_tokens: Tokens of former messages, beside the chunks.
    """
    if not has_exact_first or not tokens:  # then the others' encoding makes up for less (docs/encodings.md)
        return ALONE_RATIO
    shares = [BEHIND_RATIO] + [ALONE_RATIO if alone else BEHIND_RATIO for alone in is_alone[1:]]
    total = sum(share * count for share, count in zip(shares, tokens, strict=True)) + BEHIND_RATIO * moved_tokens
    return total / (sum(tokens) + moved_tokens)
