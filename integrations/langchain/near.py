"""Which documents of a LangChain vector store are near a document: by its own search, and its own embedder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.vectorstores import VectorStore

from prophetkv_rag.vector_stores import NearRecords, Placed, Record


class NearDocuments(NearRecords):
    """See `NearRecords`. LangChain's vector stores do not give embeddings, so texts are embedded once more."""

    def with_embeddings(self, records: Sequence[Record]) -> list[Placed]:
        """See `NearRecords.with_embeddings`."""
        texts = [record.text or "" for record in records]
        embedder = self.store.embeddings
        is_by_vector = type(self.store).similarity_search_by_vector is not VectorStore.similarity_search_by_vector
        if embedder is None or not is_by_vector:
            return [Placed(text, None) for text in texts]
        return [Placed(*one) for one in zip(texts, embedder.embed_documents(texts), strict=True)]

    def nearest(self, placed: Sequence[Placed], count: int) -> list[list[str]]:
        """See `Neighbourhood.nearest`."""
        return [[found.page_content for found in self._search(one, count)] for one in placed]

    def _search(self, placed: Placed, count: int) -> Any:
        if placed.embedding is None:
            return self.store.similarity_search(placed.text, k=count)
        return self.store.similarity_search_by_vector(placed.embedding, k=count)
