"""The forward pass of stage II in which some rows see only some of the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from prophetkv_rag.model.attention import AttentionCall
from prophetkv_rag.model.rows_pass import RowsPass
from prophetkv_rag.model.support import LayerSupport


class SparsePass(RowsPass):
    """A `RowsPass` of two groups: rows that see everything before them, and narrow rows, which see the visible keys.

    In every layer the visible keys and values are copied side by side once, for all narrow rows, which attend to them
    by position: what is not visible is left out, nothing moves, and causality and sliding windows are as ever.
    """

    def __init__(
        self, layers: Sequence[LayerSupport], rows: torch.Tensor, *, narrow: torch.Tensor, visible: torch.Tensor
    ) -> None:
        """Prepare the pass, of which only the last row's final state is wanted; that row sees everything.

        Args:
            layers: The probe's findings.
            rows: `[m]`, ascending positions.
            narrow: `[n]`, bool: positions whose rows, where they are among `rows`, see the visible keys only.
            visible: `[n]`, bool: those keys; each narrow row's own must be among them.
        """
        self.narrow = narrow
        self.seen = visible.nonzero()[:, 0]
        super().__init__(layers, rows, last_row_only=True)
        self._split()

    def set_rows(self, rows: torch.Tensor) -> None:
        """Go on with fewer rows; what the narrow ones see stays as it was."""
        super().set_rows(rows)
        self._split()

    def _split(self) -> None:
        is_narrow = self.narrow[self.rows]
        self._groups = (is_narrow.nonzero()[:, 0], (~is_narrow).nonzero()[:, 0])
        few, many = (self.rows[group] for group in self._groups)
        self._passes = (RowsPass(self.layers, few, key_positions=self.seen), RowsPass(self.layers, many))

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attend with each group over its keys."""
        if call.layer_idx == len(self.layers) - 1:
            return super().attend(call)
        few, many = self._groups
        queries = (call.query.index_select(2, group) for group in (few, many))
        narrow, wide = self._passes
        gathered = replace(
            call,
            query=next(queries),
            key=call.key.index_select(2, self.seen),
            value=call.value.index_select(2, self.seen),
        )
        attended = narrow.attend(gathered)
        output = attended.new_empty(1, self.rows.shape[0], *attended.shape[2:])
        output[:, few] = attended
        output[:, many] = wide.attend(replace(call, query=next(queries)))
        return output
