"""The offline embedding model as a LangChain component."""

from __future__ import annotations

from pathlib import Path

from langchain_core.embeddings import Embeddings

from prophetkv_rag.defaults import MiniLMEmbedder


class MiniLMEmbeddings(Embeddings):
    """all-MiniLM-L6-v2 for LangChain; loaded, and fetched if need be, at first use.

    Async methods run in a thread, as the base class has it.

    Args:
        path: Directory or name of a BERT-like encoder; `None` fetches all-MiniLM-L6-v2.
        batch_size: Texts per forward pass.
    """

    def __init__(self, path: str | Path | None = None, *, batch_size: int = 32) -> None:
        self._embedder = MiniLMEmbedder(path, batch_size=batch_size)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector of length 1 per text."""
        return self._embedder.embed(texts)

    def embed_query(self, text: str) -> list[float]:
        """The vector of one text."""
        return self._embedder.embed([text])[0]
