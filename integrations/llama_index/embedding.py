"""The offline embedding model as a LlamaIndex component."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from prophetkv_rag.defaults import MiniLMEmbedder


class MiniLMEmbedding(BaseEmbedding):
    """all-MiniLM-L6-v2 for LlamaIndex; loaded, and fetched if need be, at first use.

    Args:
        path: Directory or name of a BERT-like encoder; `None` fetches all-MiniLM-L6-v2.
        **kwargs: Fields of `BaseEmbedding`, such as `embed_batch_size`.
    """

    model_name: str = "all-MiniLM-L6-v2"
    _embedder: MiniLMEmbedder = PrivateAttr()

    def __init__(self, path: str | Path | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("embed_batch_size", 32)
        super().__init__(**kwargs)
        self._embedder = MiniLMEmbedder(path)

    @classmethod
    def class_name(cls) -> str:
        """Stable name in serialised indexes."""
        return "prophetkv_minilm_embedding"

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embedder.embed([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embedder.embed(texts)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embedder.embed([query])[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)
