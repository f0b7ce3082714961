"""Reads rows back from vLLM's pages, whose layout only vLLM's own code knows: it is asked where it writes.

A kernel may pack a block's elements in any order (on CPUs it does). So numbered elements are written by the layer's own
function into an unused block, and looked for. Blocks must all be laid out alike, one behind the other along an axis of
the tensor; what is not so is not read, and then rows are computed that could have been taken.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

_BASE = 128
"""Digits that every floating-point dtype holds exactly."""


class PageReader:
    """The rows of one kind of layers; `PageReader.of` finds it out."""

    def __init__(self, axis: int, rows: int, places: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Blocks of so many rows lie along `axis`; `places` are the keys' and values' elements in one, `[r, H, D]`."""
        self._axis, self._rows, self._places = axis, rows, places

    @classmethod
    def of(cls, layer: Any, num_blocks: int, block_size: int) -> PageReader | None:
        """Find out how a layer's pages are laid out; `None` if they cannot be read.

        Only while all pages are unused: two blocks are written, and zero afterwards.

        Args:
            layer: vLLM's.
            num_blocks: Blocks that vLLM has.
            block_size: Rows of one; a kernel may have it in parts.
        """
        pages = layer.kv_cache
        for axis in (0, 1):
            rows = 0 if pages.dim() <= axis else num_blocks * block_size // pages.shape[axis]
            if not 0 < rows <= block_size or block_size % rows:
                continue  # no axis of blocks
            try:
                reader = cls._along(layer, axis, rows)
            except (RuntimeError, ValueError, IndexError, NotImplementedError, TypeError) as error:
                logger.debug("pages do not lie along axis %d: %s", axis, error)
                continue
            if reader is not None:
                return reader
        return None

    @classmethod
    def _along(cls, layer: Any, axis: int, rows: int) -> PageReader | None:
        used = [layer.kv_cache.select(axis, block) for block in (0, -1)]
        try:
            for block in used:
                block.zero_()
            return cls._found(layer, axis, rows)
        finally:
            for block in used:
                block.zero_()

    @classmethod
    def _found(cls, layer: Any, axis: int, rows: int) -> PageReader | None:
        pages = layer.kv_cache
        first, last = 0, pages.shape[axis] - 1
        size, width = (layer.num_kv_heads, layer.head_size), getattr(layer, "head_size_v", layer.head_size)
        shapes = ((rows, *size), (rows, layer.num_kv_heads, width))
        counts = [rows * shape[1] * shape[2] for shape in shapes]
        total, found, rest = sum(counts), None, torch.arange(1, sum(counts) + 1)
        scale = 1
        while scale <= total:
            digits = (rest // scale % _BASE).to(pages.dtype)
            keys, values = (
                part.reshape(shape) for part, shape in zip(torch.split(digits, counts), shapes, strict=True)
            )
            _write(layer, keys, values, first * rows)
            read = pages.select(axis, first).reshape(-1).float().cpu().long() * scale
            found, scale = read if found is None else found + read, scale * _BASE
        assert found is not None
        places = torch.full((total + 1,), -1, dtype=torch.int64)
        places[found] = torch.arange(found.shape[0])
        if int((found > 0).sum()) != total or bool((places[1:] < 0).any()):
            return None
        both = torch.split(places[1:], counts)
        device = pages.device
        reader = cls(axis, rows, (both[0].view(shapes[0]).to(device), both[1].view(shapes[1]).to(device)))
        return reader if reader._is_right(layer, shapes, (last, first)) else None

    def _is_right(self, layer: Any, shapes: Sequence[tuple[int, ...]], blocks: tuple[int, int]) -> bool:
        """Write something else into two blocks, and read both."""
        draw = torch.Generator().manual_seed(0)
        dtype, device = layer.kv_cache.dtype, layer.kv_cache.device
        written = [[torch.randn(s, generator=draw).to(dtype).to(device) for s in shapes] for _ in blocks]
        for block, (keys, values) in zip(blocks, written, strict=True):
            _write(layer, keys, values, block * self._rows)
        slots = torch.cat([torch.arange(block * self._rows, (block + 1) * self._rows) for block in blocks])
        read = self.read(layer, slots.to(device))
        wanted = [torch.cat([both[part] for both in written]).transpose(0, 1) for part in (0, 1)]
        return all(torch.equal(one, other) for one, other in zip(read, wanted, strict=True))

    def read(self, layer: Any, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values `[Hkv, n, D]` of rows.

        Args:
            layer: vLLM's.
            slots: `[n]`, int64, on the layer's device: block times rows of a block plus offset.
        """
        blocks, order = torch.unique(slots // self._rows, return_inverse=True)
        held = layer.kv_cache.index_select(self._axis, blocks).movedim(self._axis, 0).flatten(1)
        rows = order * self._rows + slots % self._rows
        keys, values = (held[:, place.flatten()].view(-1, *place.shape[1:])[rows] for place in self._places)
        return keys.transpose(0, 1), values.transpose(0, 1)


def page_readers(layers: Sequence[Any], num_blocks: int, block_size: int) -> list[PageReader] | None:
    """Return a reader for each of vLLM's layers; `None` where one cannot be read. See `PageReader.of`."""
    kinds: dict[Any, PageReader | None] = {}
    found = []
    for layer in layers:
        pages = layer.kv_cache
        kind = (type(layer.impl), pages.shape, pages.stride(), pages.dtype, layer.num_kv_heads, layer.head_size)
        if kind not in kinds:
            kinds[kind] = PageReader.of(layer, num_blocks, block_size)
        reader = kinds[kind]
        if reader is None:
            logger.warning("vLLM's pages cannot be read here: chunks that are new in a conversation are computed")
            return None
        found.append(reader)
    return found


def _write(layer: Any, keys: torch.Tensor, values: torch.Tensor, first_slot: int) -> None:
    device = layer.kv_cache.device
    slots = torch.arange(first_slot, first_slot + keys.shape[0], device=device)
    layer.impl.do_kv_cache_update(layer, keys.to(device), values.to(device), layer.kv_cache, slots)
