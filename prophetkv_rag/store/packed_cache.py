"""A chunk's cache as a lossy blob stores it: its bytes go as they are to the kernel that gathers chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from prophetkv_rag.kernels import ops
from prophetkv_rag.store.chunk_cache import ALONE, Behind, ChunkCache


class PackedRows(NamedTuple):
    """One layer's keys or values: `stored` times `scale` plus `low`, as in `ops.RowSource`, rounded to `dtype`."""

    stored: torch.Tensor
    scale: torch.Tensor | None
    low: torch.Tensor | None
    dtype: torch.dtype

    @property
    def is_packed(self) -> bool:
        """Whether `stored` is anything else than the numbers themselves."""
        return self.scale is not None or self.stored.dtype != self.dtype

    def unpack(self) -> torch.Tensor:
        """Return the numbers."""
        if self.scale is None:
            return self.stored.to(self.dtype)
        rows = self.stored.float().mul_(self.scale)
        return (rows if self.low is None else rows.add_(self.low)).to(self.dtype)


class _Place(NamedTuple):
    """Where a scale or a low lies among all of them."""

    start: int
    shape: torch.Size


class _Part(NamedTuple):
    stored: torch.Tensor
    scale: _Place | None
    low: _Place | None
    dtype: torch.dtype


class PackedCache(ChunkCache):
    """A `ChunkCache` that holds what is stored. Its `keys` and `values` are all layers unpacked, anew at each look.

    Scales and lows, which are many and small, lie in one tensor, so that one copy brings them to a device.
    """

    __slots__ = ("_parts", "_scales")
    _parts: tuple[tuple[_Part, ...], tuple[_Part, ...]]
    _scales: torch.Tensor

    def __init__(
        self,
        input_ids: torch.Tensor,
        keys: Iterable[PackedRows],
        values: Iterable[PackedRows],
        behind: Behind = ALONE,
    ) -> None:
        """Hold a chunk.

        Args:
            input_ids: As in `ChunkCache`.
            keys: One per layer, `[Hkv, T, D]`, un-rotated; scales and lows are fp16.
            values: One per layer, `[Hkv, T, Dv]`.
            behind: As in `ChunkCache`.
        """
        small: list[torch.Tensor] = []
        count = 0

        def place(tensor: torch.Tensor | None) -> _Place | None:
            nonlocal count
            if tensor is None:
                return None
            small.append(tensor.reshape(-1))
            start, count = count, count + tensor.numel()
            return _Place(start, tensor.shape)

        parts = tuple(
            tuple(_Part(rows.stored, place(rows.scale), place(rows.low), rows.dtype) for rows in part)
            for part in (keys, values)
        )
        self._hold(input_ids, parts, torch.cat(small) if small else torch.empty(0, dtype=torch.float16), behind)

    def _hold(
        self, input_ids: torch.Tensor, parts: Sequence[tuple[_Part, ...]], scales: torch.Tensor, behind: Behind
    ) -> None:
        for name, value in (("input_ids", input_ids), ("_parts", parts), ("_scales", scales), ("behind", behind)):
            object.__setattr__(self, name, value)  # nothing else ever changes them

    @property
    def keys(self) -> tuple[torch.Tensor, ...]:
        """See `ChunkCache`."""
        return tuple(self._rows(part).unpack() for part in self._parts[0])

    @property
    def values(self) -> tuple[torch.Tensor, ...]:
        """See `ChunkCache`."""
        return tuple(self._rows(part).unpack() for part in self._parts[1])

    @property
    def dtypes(self) -> set[torch.dtype]:
        """See `ChunkCache.dtypes`."""
        return {part.dtype for parts in self._parts for part in parts}

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored, scales and lows included."""
        return self._scales.nbytes + sum(part.stored.nbytes for parts in self._parts for part in parts)

    def source(self, layer: int) -> ops.RowSource:
        """See `ChunkCache.source`."""
        keys, values = (self._rows(parts[layer]) for parts in self._parts)
        return ops.RowSource(keys.stored, values.stored, keys.scale, values.scale, keys.low, values.low)

    def ahead(self, device: torch.device) -> PackedCache:
        """See `ChunkCache.ahead`: scales and lows."""
        moved = PackedCache.__new__(PackedCache)
        moved._hold(self.input_ids, self._parts, self._scales.to(device, non_blocking=True), self.behind)
        return moved

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PackedCache:
        """See `ChunkCache.mapped`; of what is stored."""
        moved = PackedCache.__new__(PackedCache)
        parts = tuple(tuple(part._replace(stored=function(part.stored)) for part in parts) for parts in self._parts)
        moved._hold(function(self.input_ids), parts, function(self._scales), self.behind)
        return moved

    def _rows(self, part: _Part) -> PackedRows:
        scale, low = (
            None
            if place is None
            else self._scales[place.start : place.start + math.prod(place.shape)].view(place.shape)
            for place in (part.scale, part.low)
        )
        return PackedRows(part.stored, scale, low, part.dtype)
