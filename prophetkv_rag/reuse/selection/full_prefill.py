"""The baseline: nothing is reused, the model's own prefill runs on the same token ids."""

from __future__ import annotations

from typing import ClassVar

from prophetkv_rag.reuse.selection.base import QueryContext, Selection, Strategy


class FullPrefill(Strategy):
    """Full prefill, by the model's plain forward with the attention it was loaded with."""

    name: ClassVar[str] = "full_prefill"
    uses_caches: ClassVar[bool] = False

    def select(self, context: QueryContext) -> Selection:
        """Select every chunk token."""
        return Selection(context.is_chunk.nonzero()[:, 0])
