"""The other control: every chunk token is reused as it is (the paper's NaiveReuse)."""

from __future__ import annotations

from typing import ClassVar

from prophetkv_rag.reuse.selection.base import QueryContext, Selection, Strategy


class FullReuse(Strategy):
    """Recompute nothing; only the tokens outside the chunks are computed, over the stale caches."""

    name: ClassVar[str] = "full_reuse"

    def select(self, context: QueryContext) -> Selection:
        """Select no token."""
        return Selection(context.is_chunk.nonzero()[:0, 0])
