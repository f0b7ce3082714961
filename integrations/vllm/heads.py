"""Stored caches hold whole heads, whatever the tensor-parallel size; each rank takes its own, and gives them back."""

from __future__ import annotations

import torch
from vllm.distributed import get_tp_group

from prophetkv_rag.integrations.vllm.runner import VLLMRunner
from prophetkv_rag.store import ChunkCache


def own_heads(cache: ChunkCache, rows: slice, runner: VLLMRunner, *, total: int) -> ChunkCache:
    """Cut this rank's heads and some rows out of a cache; the cache itself where that is all of it.

    Args:
        cache: With whole heads.
        rows: Which of its tokens.
        runner: Knows the rank.
        total: Key/value heads of the model. With more ranks than that, neighbouring ranks hold the same head.
    """
    if runner.num_ranks == 1 and rows == slice(0, cache.num_tokens):
        return cache
    if total >= runner.num_ranks:
        own = total // runner.num_ranks
        first = runner.rank * own
    else:
        own, first = 1, runner.rank // (runner.num_ranks // total)
    heads = slice(first, first + own)
    return ChunkCache(
        cache.input_ids[rows],
        tuple(key[heads, rows].contiguous() for key in cache.keys),
        tuple(value[heads, rows].contiguous() for value in cache.values),
        cache.behind,
    )


def whole_heads(cache: ChunkCache, runner: VLLMRunner, *, total: int) -> ChunkCache:
    """Gather all ranks' heads of a cache; every rank must call this."""
    if runner.num_ranks == 1:
        return cache
    group = get_tp_group()

    def gathered(states: torch.Tensor) -> torch.Tensor:
        everything: torch.Tensor = group.all_gather(states.contiguous(), dim=0)
        return everything[:: everything.shape[0] // total].contiguous()  # one of each that several ranks hold

    keys, values = (tuple(map(gathered, part)) for part in (cache.keys, cache.values))
    return ChunkCache(cache.input_ids, keys, values, cache.behind)
