"""Query time, first step: put the chunks' caches at their new positions, rotating every key exactly once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prophetkv_rag.chunks import EncodingPrefix
from prophetkv_rag.model import ModelSupport, RopeTables, RowsLayer
from prophetkv_rag.store import ChunkCache


class Assembly:
    """One prompt's cache, layer by layer: only one of them need be held at a time."""

    def __init__(
        self,
        support: ModelSupport,
        caches: Sequence[ChunkCache],
        starts: Sequence[int],
        num_slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        prefix: EncodingPrefix | None = None,
        known_prefix: int = 0,
    ) -> None:
        """Prepare what all layers share; see `assemble_caches`."""
        spans = [torch.arange(start, start + cache.num_tokens) for cache, start in zip(caches, starts, strict=True)]
        covered = torch.zeros(num_slots, dtype=torch.bool)
        for span in spans:
            covered[span] = True
        self._tables = RopeTables(torch.cat([torch.arange(0), *spans]).to(device))
        self._gaps = (~covered).nonzero()[:, 0].to(device)
        self._support = support
        self._caches = [cache.ahead(device) for cache in caches]
        self._starts = starts
        self._num_slots = num_slots
        self._dtype, self._device = dtype, device
        self._prefix = None if prefix is None else prefix.layers
        self._known_prefix = known_prefix

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one decoder layer's keys `[1, Hkv, num_slots, D]` and values, made anew at each call."""
        found = self._support.layers[index]
        size = (1, found.num_key_value_heads, self._num_slots)
        keys = torch.empty(*size, found.head_dim, dtype=self._dtype, device=self._device)
        values = torch.empty(*size, found.value_head_dim, dtype=self._dtype, device=self._device)
        keys.index_fill_(2, self._gaps, 0)
        values.index_fill_(2, self._gaps, 0)
        sources = [cache.source(index).to(self._device) for cache in self._caches]
        if sources:  # a prompt that goes on from a former one may bring no chunk
            self._tables.gather(keys[0], values[0], sources, self._starts, found.rotation)
        if self._prefix is not None:
            prefix_keys, prefix_values = self._prefix[index]
            keys[0, :, : self._known_prefix] = prefix_keys[:, : self._known_prefix]
            values[0, :, : self._known_prefix] = prefix_values[:, : self._known_prefix]
        return keys, values


def assemble_caches(
    support: ModelSupport,
    caches: Sequence[ChunkCache],
    starts: Sequence[int],
    num_slots: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    prefix: EncodingPrefix | None = None,
    known_prefix: int = 0,
) -> list[RowsLayer]:
    """Assemble one cache for the whole prompt from chunk caches.

    Args:
        support: The probe's findings.
        caches: The chunks' caches, in prompt order.
        starts: Position of each chunk's first token.
        num_slots: Rows to make room for: the prompt's tokens (and a question's, where it asks from elsewhere).
        dtype: Dtype of the cache.
        device: Device of the cache.
        prefix: The encoding prefix.
        known_prefix: How many of its rows the prompt begins with; they are put there.

    Returns:
        One layer per decoder layer with keys `[1, Hkv, num_slots, D]` and values alike; rows of tokens outside the
        chunks are 0 until a pass writes them (a masked row still takes part in the arithmetic, so it must be finite).
    """
    assembly = Assembly(
        support,
        caches,
        starts,
        num_slots,
        dtype=dtype,
        device=device,
        prefix=prefix,
        known_prefix=known_prefix,
    )
    return [RowsLayer(*assembly.layer(index)) for index in range(len(support.layers))]
