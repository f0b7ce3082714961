"""transformers' cache interface: layers that a pass writes rows into in place, and filled ones to generate from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from prophetkv_rag.kernels import ops


class RowsLayer(DynamicLayer):
    """A cache layer with room for the whole prompt, into which a pass writes its rows in place.

    `keys` `[1, Hkv, n, D]` and `values` `[1, Hkv, n, Dv]` are filled with stale rows before the pass. `rows` is the
    position of each computed row; with `keep_stale` the rows of the last
    `update` are kept too, for strategies that look at deviations.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.rows: torch.Tensor | None = None
        self.keep_stale = False
        self.stale: tuple[torch.Tensor, torch.Tensor] | None = None
        self.fresh: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows and return all keys and values."""
        if self.rows is None:
            return super().update(key_states, value_states, *args, **kwargs)
        if self.keep_stale:
            self.stale = (self.keys[:, :, self.rows], self.values[:, :, self.rows])
            self.fresh = (key_states, value_states)
        ops.rope_scatter(key_states, value_states, self.rows, self.keys, self.values)
        return self.keys, self.values


class ResumableLayer(DynamicLayer):
    """A filled layer that `model.generate` continues from.

    It holds a row for each of the prompt's N tokens, but reports N - 1: generate runs every token that the cache does
    not cover and needs the last one's logits, so it computes that row again, over the one held.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.is_provisional = True

    def get_seq_length(self) -> int:
        """Return the rows that are final."""
        return int(self.keys.shape[-2]) - int(self.is_provisional)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows; the first time they begin with the last prompt token's."""
        if self.is_provisional:
            self.keys, self.values = self.keys[:, :, :-1], self.values[:, :, :-1]
            self.is_provisional = False
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove rows from the end; the provisional one counts as removed already."""
        if self.is_provisional and tokens_to_remove < 0:
            self.keys, self.values = self.keys[:, :, :-1], self.values[:, :, :-1]
            self.is_provisional = False
        super().crop(tokens_to_remove)


class GrowingLayer(DynamicLayer):
    """A filled layer with room behind its rows, so that a step writes one row and does not copy all others."""

    ROOM = 64
    """Least rows of room that are made at a time; else an eighth of the rows there are."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows; `keys` and `values` are those written so far."""
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        is_ours = self._room is not None and self._room[0].data_ptr() == self.keys.data_ptr()  # nobody replaced them
        if self._room is None or not is_ours or self._room[0].shape[-2] < stop:
            room = stop + max(self.ROOM, stop // 8)
            keys, values = (part.new_empty(*part.shape[:-2], room, part.shape[-1]) for part in (self.keys, self.values))
            keys[:, :, :start], values[:, :, :start] = self.keys, self.values
            self._room = keys, values
        keys, values = self._room
        keys[:, :, start:stop], values[:, :, start:stop] = key_states, value_states
        self.keys, self.values = keys[:, :, :stop], values[:, :, :stop]
        return self.keys, self.values


def resumable_cache(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> DynamicCache:
    """Return a transformers cache of `ResumableLayer`s over per-layer `[1, Hkv, N, D]` tensors, not copied."""
    cache = DynamicCache()
    cache.layers.extend(ResumableLayer(*pair) for pair in zip(keys, values, strict=True))
    return cache


def complete_cache(cache: Cache) -> DynamicCache:
    """Return a plain cache of all N rows of a `resumable_cache`, to feed the next token to; nothing is copied."""
    complete = DynamicCache()
    complete.layers.extend(GrowingLayer(filled.keys, filled.values) for filled in cache.layers)
    return complete


def cache_of(layers: Sequence[CacheLayerMixin]) -> Cache:
    """Return a transformers cache made of our own layers."""
    return Cache(layers=list(layers))
