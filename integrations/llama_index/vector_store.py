"""`ProphetKVChromaVectorStore`: LlamaIndex's Chroma store, on a collection that computes and keeps KV caches."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.utils import iter_batch
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery, VectorStoreQueryResult
from llama_index.core.vector_stores.utils import node_to_metadata_dict
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.chroma.base import _to_chroma_filter

from prophetkv_rag.chroma import KVCachingCollection
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index.altered import forget_altered

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.vector_stores import CachingEngine

ADD_BATCH = 1000
"""Nodes in one write; SQLite, behind Chroma, bounds the ids of one read."""


class ProphetKVChromaVectorStore(ChromaVectorStore):
    """A Chroma vector store whose chunks get their KV caches computed as they are written.

    Hand it to an unmodified index: `VectorStoreIndex.from_documents(documents,
    storage_context=StorageContext.from_defaults(vector_store=store), embed_model=...)`, or to
    `VectorStoreIndex.from_vector_store(store, embed_model=...)` for what is stored already. Deleting or replacing a
    document drops the caches that nothing else refers to.

    Async methods run in a thread: computing caches takes seconds, and Chroma's calls block. Calls that mean "nothing"
    (`add([])`, `delete_nodes([])`, `clear()` of an empty store) do nothing.

    Args:
        chroma_collection: A chromadb collection, or a `KVCachingCollection`, which has its engine already.
        engine: Computes and keeps the caches; the same one that `ProphetKVLLM` answers with.
        **fields: Fields of `ChromaVectorStore`, such as `persist_dir`; for the record only.
    """

    def __init__(
        self,
        chroma_collection: Collection | KVCachingCollection | None = None,
        engine: ProphetKVEngine | None = None,
        **fields: Any,
    ) -> None:
        if chroma_collection is None:
            msg = "chroma_collection is missing; pass one, or use ProphetKVChromaVectorStore.from_client(client, name)"
            raise InputError(msg)
        if not isinstance(chroma_collection, KVCachingCollection):
            if engine is None:
                msg = "engine is missing: it computes the chunk caches; pass the one that your ProphetKVLLM uses"
                raise InputError(msg)
            chroma_collection = KVCachingCollection(chroma_collection, engine)
        fields.setdefault("collection_name", chroma_collection.name)
        super().__init__(chroma_collection=chroma_collection, **fields)

    @classmethod
    def from_client(
        cls, client: ClientAPI, name: str, engine: ProphetKVEngine, **collection_kwargs: Any
    ) -> ProphetKVChromaVectorStore:
        """Open or create the collection `name` (LlamaIndex computes the embeddings, so Chroma downloads no model).

        Args:
            client: An ephemeral, persistent or HTTP client of chromadb.
            name: The collection's name.
            engine: Computes and keeps the caches.
            **collection_kwargs: More arguments of `get_or_create_collection`, such as `configuration`.
        """
        collection_kwargs.setdefault("embedding_function", None)
        return cls(client.get_or_create_collection(name, **collection_kwargs), engine)

    @classmethod
    def from_collection(
        cls, collection: Collection | KVCachingCollection, engine: ProphetKVEngine | None = None
    ) -> ProphetKVChromaVectorStore:
        """Same as the constructor, under the base class's name for it."""
        return cls(collection, engine)

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised pipelines."""
        return "ProphetKVChromaVectorStore"

    def add(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> list[str]:
        """Write nodes with their embeddings, computing the KV caches that are not stored yet.

        A node whose id is stored already replaces the old one (the base class would silently keep the old text), at
        no cost if its text is the same.
        """
        for batch in iter_batch(nodes, ADD_BATCH):
            ids = [node.node_id for node in batch]
            stored = self._collection.get(ids=ids, include=["metadatas"])
            old_metadata = dict(zip(stored["ids"], stored["metadatas"], strict=True))
            self._collection.upsert(
                ids=ids,
                embeddings=[node.get_embedding() for node in batch],
                metadatas=[self._metadata_of(node, old_metadata.get(node.node_id)) for node in batch],
                documents=[node.get_content(metadata_mode=MetadataMode.NONE) for node in batch],
            )
            forget_altered(self._engine, old_metadata)
        return [node.node_id for node in nodes]

    def _metadata_of(self, node: BaseNode, old: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the node as Chroma metadata; `None` clears a key of the old record, which `upsert` would keep."""
        new = node_to_metadata_dict(node, remove_text=True, flat_metadata=self.flat_metadata)
        return dict.fromkeys(old or {}) | {key: "" if value is None else value for key, value in new.items()}

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Return the nodes with these ids that pass the filters; `None` stands for all of them."""
        if node_ids is not None and not node_ids:
            return []
        where = _to_chroma_filter(filters) if filters is not None else {}
        return self._get(None, where=where, ids=node_ids).nodes

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete the nodes of a document."""
        super().delete(ref_doc_id, **delete_kwargs)
        forget_altered(self._engine, [ref_doc_id])

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Delete the nodes with these ids that pass the filters; neither ids nor filters deletes nothing."""
        where = _to_chroma_filter(filters) if filters is not None else None
        if where and node_ids is None:
            self._collection.delete(where=where)
            forget_altered(self._engine, None)
        elif node_ids:
            self._collection.delete(ids=node_ids, where=where or None)
            forget_altered(self._engine, node_ids)

    def clear(self) -> None:
        """Delete every node."""
        self._collection.delete(ids=self._collection.get(include=[])["ids"])
        forget_altered(self._engine, None)

    @property
    def _engine(self) -> CachingEngine:
        return self._collection.engine

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Async twin of `get_nodes`."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Async twin of `add`."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Async twin of `delete`."""
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Async twin of `delete_nodes`."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters, **delete_kwargs)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Async twin of `query`."""
        return await asyncio.to_thread(self.query, query, **kwargs)

    async def aclear(self) -> None:
        """Async twin of `clear`."""
        await asyncio.to_thread(self.clear)
