"""How the scattered rows of a pass are cut into blocks, and which keys and mask each block needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from prophetkv_rag.once import once

BLOCK_ELEMENTS = 384
"""Query rows x groups handled per attention call: large enough for the matrix products, small enough that a block of
scattered rows sees few keys beyond each row's own position."""
MASK_CACHE_BYTES = 64 << 20
"""Masks of a pass are shared by all its layers up to this size; beyond it each call makes its own again."""
MIN_PLAIN_KEYS = 256
"""Keys before a block that are worth an attention call of their own, without a mask."""


class RowBlock(NamedTuple):
    """Some rows of a pass and the keys they may see."""

    rows: slice
    plain: slice
    """Keys that every row of the block sees; may be empty."""
    masked: slice
    """The keys after them, up to the block's last row; never empty."""
    mask: torch.Tensor
    """Additive fp32 mask `[G * block rows, masked keys]`: 0 or -inf; each row sees at least one masked key, unless
    `hidden_keys` hides them all."""

    @property
    def keys(self) -> slice:
        """All keys of the block."""
        return slice(self.plain.start, self.masked.stop)


class RowBlocks:
    """The rows of a pass cut into blocks, each with the keys it may see and the mask for it.

    A dense `[m, n]` mask would waste work and memory traffic: sorted rows in blocks need keys only up to their own last
    position (and, with a sliding window, from their own first), and only those after the block's first row need a
    mask. Made once per pass and window, shared by the layers. The keys may be some of a cache, gathered: positions then
    say who sees whom.

    Attributes:
        last_keys: `[m]`, int64, ascending: index of the last key that each row sees.
        first_keys: `[m]`, int64, ascending: index of the first, with a sliding window; `None` where that is 0.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        *,
        num_groups: int,
        sliding_window: int | None = None,
        hidden_keys: torch.Tensor | None = None,
        key_positions: torch.Tensor | None = None,
    ) -> None:
        """Plan the blocks.

        Args:
            rows: `[m]`, int64, ascending: the position of each computed row.
            num_groups: G, the query heads that share a key/value head.
            sliding_window: A row at p sees keys at positions > p - sliding_window; `None` for all.
            hidden_keys: `[n]`, bool: keys that no row may see (slots not filled yet), or `None`.
            key_positions: `[n]`, int64, ascending: the position of each key, each row's own among them; `None` where
                key i stands at position i.
        """
        self.rows = rows
        self.num_groups = num_groups
        self.sliding_window = sliding_window
        self.hidden_keys = hidden_keys
        # Rows and keys are both in order, so what a row sees is a run of keys: from a first to a last index.
        self.last_keys, self.first_keys = rows, None
        if key_positions is not None:
            self.last_keys = torch.searchsorted(key_positions, rows, right=True) - 1
        if sliding_window is not None:
            before = rows - sliding_window
            self.first_keys = (
                (before + 1).clamp_min_(0)
                if key_positions is None
                else torch.searchsorted(key_positions, before, right=True)
            )
        self._block_rows = max(16, BLOCK_ELEMENTS // num_groups)
        self._masks: dict[int, torch.Tensor] = {}
        self._mask_bytes = 0
        self._outside: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tile_rows: dict[tuple[int, int], torch.Tensor] = {}

    @once
    def _bounds(self) -> list[tuple[int, int]]:
        """First and last key of each row.

        One copy to the host, rather than two synchronisations per block and layer; the GPU kernels need none.
        """
        last: list[int] = self.last_keys.tolist()
        first: list[int] = [0] * len(last) if self.first_keys is None else self.first_keys.tolist()
        return list(zip(first, last, strict=True))

    def hidden_outside(self, context: torch.Tensor | None) -> torch.Tensor | None:
        """Return `[n]`, bool: keys that are hidden or outside `context` (`None`: none is); `None` for none."""
        if context is None:
            return self.hidden_keys
        if self._outside is None or self._outside[0] is not context:
            hidden = ~context if self.hidden_keys is None else ~context | self.hidden_keys
            self._outside = (context, hidden)
        return self._outside[1]

    def rows_of_tiles(self, num_keys: int, tile_keys: int) -> torch.Tensor:
        """Return `[2, tiles]`, int64: of each tile of keys, the first row that may see any of it, and the last + 1."""
        if (num_keys, tile_keys) not in self._tile_rows:
            starts = torch.arange(0, num_keys, tile_keys, device=self.rows.device)
            begin = torch.searchsorted(self.last_keys, starts)
            if self.first_keys is None:
                end = torch.full_like(begin, self.rows.shape[0])
            else:
                end = torch.searchsorted(self.first_keys, starts + tile_keys)
            self._tile_rows[num_keys, tile_keys] = torch.stack([begin, end])
        return self._tile_rows[num_keys, tile_keys]

    def __iter__(self) -> Iterator[RowBlock]:
        """Yield the blocks in order."""
        for start in range(0, len(self._bounds), self._block_rows):
            stop = min(start + self._block_rows, len(self._bounds))
            (key_start, first), (last_start, last) = self._bounds[start], self._bounds[stop - 1]
            # Up to the first row every key is plain, unless some are hidden or fall out of the last row's window.
            everything = self.hidden_keys is None and last_start == 0
            boundary = first if everything and first - key_start >= MIN_PLAIN_KEYS else key_start
            mask = self._mask(start, stop, boundary, last + 1)
            yield RowBlock(slice(start, stop), slice(key_start, boundary), slice(boundary, last + 1), mask)

    def _mask(self, start: int, stop: int, key_start: int, key_stop: int) -> torch.Tensor:
        if start in self._masks:
            return self._masks[start]
        keys = torch.arange(key_start, key_stop, device=self.rows.device)[None, :]
        masked = keys > self.last_keys[start:stop, None]
        if self.first_keys is not None:
            masked |= keys < self.first_keys[start:stop, None]
        if self.hidden_keys is not None:
            masked |= self.hidden_keys[None, key_start:key_stop]
        mask = torch.zeros(masked.shape, dtype=torch.float32, device=keys.device).masked_fill_(masked, float("-inf"))
        mask = mask.repeat(self.num_groups, 1)
        if self._mask_bytes + mask.nbytes <= MASK_CACHE_BYTES:
            self._masks[start] = mask
            self._mask_bytes += mask.nbytes
        return mask
