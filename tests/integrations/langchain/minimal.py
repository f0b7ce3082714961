"""A vector store as somebody may write it: the two methods that LangChain wants, and trouble on demand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore


class DiskFullError(Exception):
    """What the vector stores here fail with."""


class MinimalStore(VectorStore):
    """Keeps texts by id, and cannot be read but by search."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.held: dict[str, Document] = {}
        self.fails_at = fails_at
        """Which record of a call is not written any more, nor deleted."""
        self.num_given = 0

    def add_texts(
        self, texts: Iterable[str], metadatas: list[dict] | None = None, *, ids: Any = None, **kwargs: Any
    ) -> list[str]:
        names = []
        for number, text in enumerate(texts):
            if number == self.fails_at:
                raise DiskFullError
            self.num_given += 1
            name = (ids[number] if ids else None) or f"given-{self.num_given}"
            self.held[name] = Document(text, id=name, metadata=metadatas[number] if metadatas else {})
            names.append(name)
        return names

    def delete(self, ids: list[str] | None = None, *, topic: str | None = None, **kwargs: Any) -> bool | None:
        if ids is None:
            ids = [name for name, one in self.held.items() if one.metadata.get("topic") == topic]
        for number, name in enumerate(ids):
            if number == self.fails_at:
                raise DiskFullError
            self.held.pop(name, None)
        return True

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return list(self.held.values())[:k]

    @classmethod
    def from_texts(cls, texts: list[str], embedding: Embeddings, metadatas: Any = None, **kwargs: Any) -> MinimalStore:
        store = cls()
        store.add_texts(texts, metadatas, **kwargs)
        return store


class ReadableStore(MinimalStore):
    """As above; what has which id may be asked."""

    def get_by_ids(self, ids: Any, /) -> list[Document]:
        return [self.held[name] for name in ids if name in self.held]


class SlowStore(InMemoryVectorStore):
    """Writes one record after the other, as an async store does, and fails at one of them."""

    fails_at: int | None = None

    async def aadd_documents(self, documents: list[Document], ids: list[str] | None = None, **kwargs: Any) -> list[str]:
        import asyncio

        names = []
        for number, document in enumerate(documents):
            await asyncio.sleep(0)
            if number == self.fails_at:
                raise DiskFullError
            names += self.add_documents([document], ids=None if ids is None else [ids[number]])
        return names
