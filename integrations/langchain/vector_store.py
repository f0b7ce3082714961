"""`ProphetKVChroma`: LangChain's Chroma store, on a collection that computes and keeps KV caches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from langchain_chroma import Chroma

from prophetkv_rag.chroma import KVCachingCollection
from prophetkv_rag.errors import InputError
from prophetkv_rag.text import well_formed

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine


class ProphetKVChroma(Chroma):
    """A Chroma vector store whose documents get their KV caches computed as they are written.

    Everything else is LangChain's own: retrievers, filters, `from_documents`, the record manager's `index(...)`.
    Deleting or replacing a document drops the caches that nothing else refers to.

    Args:
        *args: As `langchain_chroma.Chroma`.
        engine: Computes and keeps the caches; the same one that the chat model answers with.
        **kwargs: As `langchain_chroma.Chroma`.

    Raises:
        InputError: If the engine is missing.

    Example:
        ```python
        store = ProphetKVChroma.from_documents(documents, embeddings, engine=model.engine)
        ```
    """

    def __init__(self, *args: Any, engine: ProphetKVEngine | None = None, **kwargs: Any) -> None:
        if engine is None:
            msg = "engine is missing: it computes the chunk caches; pass engine=model.engine of your ChatProphetKV"
            raise InputError(msg)
        self.engine = engine
        self._proxy: KVCachingCollection | None = None
        super().__init__(*args, **kwargs)

    @property
    def _collection(self) -> Any:
        """Chroma's collection behind the caching proxy; what every method of the base class reads and writes."""
        collection = super()._collection
        if self._proxy is None or self._proxy.collection is not collection:
            self._proxy = KVCachingCollection(collection, self.engine)
        return self._proxy

    def add_texts(self, texts: Iterable[str], *args: Any, **kwargs: Any) -> list[str]:
        """As the base class's; half characters are replaced before the embedding, which may refuse them, reads them."""
        return super().add_texts([well_formed(text) for text in texts], *args, **kwargs)

    def delete_collection(self) -> None:
        """Delete the collection, and the caches that nothing else refers to."""
        proxy = self._collection
        super().delete_collection()
        proxy.drop()

    def cache_existing(self) -> None:
        """Compute the caches of documents written without this class, for another model, or kept in RAM only."""
        self._collection.cache_existing()
