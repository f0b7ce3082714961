"""Query time, first step: put the chunks' caches at their new positions, rotating every key exactly once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prophetkv_rag.model import ModelSupport, RopeTables, RowsLayer
from prophetkv_rag.store import ChunkCache


def assemble_caches(
    support: ModelSupport,
    caches: Sequence[ChunkCache],
    starts: Sequence[int],
    num_slots: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> list[RowsLayer]:
    """Assemble one cache for the whole prompt from chunk caches.

    Args:
        support: The probe's findings.
        caches: The chunks' caches, in prompt order.
        starts: Position of each chunk's first token.
        num_slots: Rows to make room for: the prompt's tokens (and a question's, where it asks from elsewhere).
        dtype: Dtype of the cache.
        device: Device of the cache.

    Returns:
        One layer per decoder layer with keys `[1, Hkv, num_slots, D]` and values alike; rows of tokens outside the
        chunks are 0 until a pass writes them (a masked row still takes part in the arithmetic, so it must be finite).
    """
    spans = [torch.arange(start, start + cache.num_tokens) for cache, start in zip(caches, starts, strict=True)]
    tables = RopeTables(torch.cat(spans).to(device))
    covered = torch.zeros(num_slots, dtype=torch.bool)
    for span in spans:
        covered[span] = True
    gaps = (~covered).nonzero()[:, 0].to(device)
    caches = [cache.ahead(device) for cache in caches]
    layers = []
    for index, found in enumerate(support.layers):
        heads = found.num_key_value_heads
        keys = torch.empty(1, heads, num_slots, found.head_dim, dtype=dtype, device=device)
        values = torch.empty(1, heads, num_slots, found.value_head_dim, dtype=dtype, device=device)
        keys.index_fill_(2, gaps, 0)
        values.index_fill_(2, gaps, 0)
        sources = [cache.source(index).to(device) for cache in caches]
        tables.gather(keys[0], values[0], sources, starts, found.rotation)
        layers.append(RowsLayer(keys, values))
    return layers
