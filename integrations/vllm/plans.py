"""A request's layout and what its stages cost: the same for the scheduler, which admits, and the workers, which run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from prophetkv_rag.config import FirstChunk
from prophetkv_rag.integrations.vllm.messages import LoadPlan
from prophetkv_rag.prompt import ChunkSpan, PromptLayout, TokenMatch, shared_length
from prophetkv_rag.reuse import token_budget

T = TypeVar("T")


def follows_opening(input_ids: tuple[int, ...], first: TokenMatch, prefix_ids: tuple[int, ...]) -> bool:
    """Whether a prompt's first chunk stands, whole, right behind what chunks are encoded behind."""
    return not first.skipped and input_ids[: first.start] == prefix_ids


def make_layout(
    input_ids: Sequence[int], matches: Sequence[TokenMatch], question_ids: tuple[int, ...], prefix_ids: tuple[int, ...]
) -> PromptLayout:
    """Lay a prompt out by the chunks that were found in its token ids."""
    ids = tuple(input_ids)
    return PromptLayout(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        chunks=tuple(ChunkSpan(match.key, match.start, ids[match.start : match.stop]) for match in matches),
        probe_ids=question_ids,
        known_prefix=shared_length(ids[: matches[0].start], prefix_ids),
        exact_first_chunk=follows_opening(ids, matches[0], prefix_ids),
    )


def layout_of(load: LoadPlan, prefix_ids: tuple[int, ...]) -> PromptLayout:
    """Return the layout of a request that is to be filled; rows that it goes on from are a known prefix."""
    layout = make_layout(load.input_ids, load.matches, load.question_ids, prefix_ids)
    layout = replace(layout, known_prefix=max(layout.known_prefix, load.num_held))
    # It is exact only if its cache was encoded behind the opening alone, too.
    return replace(layout, exact_first_chunk=layout.exact_first_chunk and not load.behind[0])


def stage_one_rows(layout: PromptLayout) -> int:
    """Rows that stage I runs, if it runs."""
    return layout.context_start - layout.known_prefix + layout.num_tokens - layout.suffix_start + len(layout.probe_ids)


def num_recomputed(layout: PromptLayout, recompute_ratio: float, first_chunk: FirstChunk) -> int:
    """Chunk tokens that stage II runs, as `ProphetKV.select` has it.

    An exact first chunk is left as it is, and with `"exact"` one that is not is recomputed whole, beyond the ratio.
    """
    budget, total = token_budget(recompute_ratio, layout.num_chunk_tokens), int(layout.is_chunk.sum())
    if budget >= total or first_chunk == "cached" or not recompute_ratio:
        return min(budget, total)
    first = layout.chunks[0]
    whole = int(layout.is_chunk[first.start : first.stop].sum())
    if layout.exact_first_chunk:
        return min(budget, total - whole)
    return min(budget, total - whole) + whole if first_chunk == "exact" else budget


def stage_two_rows(layout: PromptLayout, recompute_ratio: float, first_chunk: FirstChunk) -> int:
    """Rows that stage II runs: all but vLLM's own, the last."""
    fresh = layout.num_tokens - 1 - int(layout.is_chunk.sum()) - layout.known_prefix
    return fresh + num_recomputed(layout, recompute_ratio, first_chunk)


def groups_of(items: Sequence[T], rows: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Group what runs together: so many rows at most, but one item always."""
    group: list[T] = []
    total = 0
    for item in items:
        if group and total + rows(item) > most:
            yield group
            group, total = [], 0
        group.append(item)
        total += rows(item)
    if group:
        yield group
