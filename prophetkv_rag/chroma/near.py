"""How a Chroma collection finds what is near: by the embeddings that it has already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prophetkv_rag.vector_stores import Placed


class NearInChroma:
    """See `Neighbourhood`."""

    def __init__(self, collection: Any) -> None:
        self._collection = collection

    def place(self, names: Sequence[str]) -> tuple[list[Placed], int]:
        """See `Neighbourhood.place`."""
        found = self._collection.get(ids=list(names), include=["embeddings", "documents"])
        embeddings = found["embeddings"]
        placed = [
            Placed(text, embedding)
            for text, embedding in zip(found["documents"] or (), () if embeddings is None else embeddings, strict=False)
            if text and text.strip() and embedding is not None
        ]
        return placed, len(found["ids"]) - len(placed)

    def nearest(self, placed: Sequence[Placed], count: int) -> list[list[str | None]]:
        """See `Neighbourhood.nearest`."""
        found: list[list[str | None]] = self._collection.query(
            query_embeddings=[one.embedding for one in placed],
            n_results=min(count, self._collection.count()),
            include=["documents"],
        )["documents"]
        return found
