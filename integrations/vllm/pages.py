"""One prompt's keys and values, a layer at a time: assembled, merged with fresh rows, written into pages, let go.

What a prompt takes over from a former one is read from the pages where vLLM has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prophetkv_rag.integrations.vllm.page_reader import PageReader
from prophetkv_rag.kernels import ops
from prophetkv_rag.model import RowsLayer
from prophetkv_rag.reuse import Assembly


class Pages:
    """Where vLLM keeps one request's rows."""

    def __init__(
        self, block_ids: Sequence[int], block_size: int, *, first_row: int, stop: int, device: torch.device
    ) -> None:
        """Rows `[first_row, stop)` are to be written, into these blocks."""
        rows = torch.arange(first_row, stop)
        blocks = torch.tensor(block_ids, dtype=torch.int64)[rows // block_size]
        self._slots = (blocks * block_size + rows % block_size).to(device)
        self._rows = slice(first_row, stop)

    def write(self, layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write one layer's rows, `[1, Hkv, n, D]`, by the layer's own function: it alone knows its pages' layout."""
        key, value = (states[0, :, self._rows].transpose(0, 1).contiguous() for states in (keys, values))
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, self._slots)


class HeldRows:
    """A prompt's first rows, which are in its pages already."""

    def __init__(
        self, block_ids: Sequence[int], block_size: int, count: int, readers: Sequence[PageReader], device: torch.device
    ) -> None:
        """`readers` are one for each layer."""
        rows = torch.arange(count)
        blocks = torch.tensor(block_ids, dtype=torch.int64)[rows // block_size]
        self._slots = (blocks * block_size + rows % block_size).to(device)
        self._readers = readers

    def put_into(self, index: int, layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy one layer's into `[1, Hkv, n, D]`; `layer` is vLLM's."""
        count = self._slots.shape[0]
        keys[0, :, :count], values[0, :, :count] = self._readers[index].read(layer, self._slots)


class PagedLayer(RowsLayer):
    """A `RowsLayer` that is assembled when its rows come, and holds nothing before or after."""

    def __init__(
        self, assembly: Assembly, index: int, layer: Any, pages: Pages | None, held: HeldRows | None = None
    ) -> None:
        """`layer` is vLLM's; without `pages` nothing is written (stage I)."""
        nothing = torch.empty(0)
        super().__init__(nothing, nothing)
        self._assembly, self._index, self._layer, self._pages = assembly, index, layer, pages
        self._held = held
        self._former: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.is_last = True
        """Whether these are the prompt's last rows; else they are held for those that come after them."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Assemble, put the fresh rows in, write to the pages; return all keys and values."""
        keys, values = self._assembled()
        assert self.rows is not None
        for former_key, former_value, rows in self._former:
            ops.rope_scatter(former_key, former_value, rows, keys, values)
        ops.rope_scatter(key_states, value_states, self.rows, keys, values)
        if not self.is_last:
            self._former.append((key_states.clone(), value_states.clone(), self.rows))
        elif self._pages is not None:
            self._pages.write(self._layer, keys, values)
        return keys, values

    def write_stale(self) -> None:
        """Write the assembled rows as they are, where a prompt has no row to compute."""
        assert self._pages is not None
        self._pages.write(self._layer, *self._assembled())

    def _assembled(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._assembly.layer(self._index)
        if self._held is not None:
            self._held.put_into(self._index, self._layer, keys, values)
        return keys, values
