"""Which nodes of a LlamaIndex vector store are near a node: by its own search, from the nodes' own embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryResult

from prophetkv_rag.once import once
from prophetkv_rag.vector_stores import NearRecords, Placed, Record, UnreadableError

Embeddings = Mapping[str, Any]


class NearNodes(NearRecords):
    """See `NearRecords`."""

    def kept_text(self, name: str) -> str | None:
        """See `NearRecords.kept_text`: what was just written, or what the caller reads."""
        if name in self.written:
            return self.written[name].text
        node = self._read.get(name)
        return None if node is None else node.get_content(metadata_mode=MetadataMode.NONE)

    def with_embeddings(self, records: Sequence[Record]) -> list[Placed]:
        """See `NearRecords.with_embeddings`; embeddings that came with no node are read from the vector store."""
        missing = [record.name for record in records if record.embedding is None]
        kinds = [kind.__name__ for kind in type(self.store).__mro__]
        reader = next((_EMBEDDINGS[kind] for kind in kinds if kind in _EMBEDDINGS), None)
        stored = reader(self.store, missing) if reader is not None and missing else {}
        found = [
            Placed(record.text or "", stored.get(record.name) if record.embedding is None else record.embedding)
            for record in records
        ]
        return [one for one in found if one.embedding is not None]

    def nearest(self, placed: Sequence[Placed], count: int) -> list[list[str | None]]:
        """See `Neighbourhood.nearest`."""
        return [self._texts(self.store.query(_query(one.embedding, count))) for one in placed]

    def _texts(self, found: VectorStoreQueryResult) -> list[str | None]:
        if found.nodes:
            return [node.get_content(metadata_mode=MetadataMode.NONE) for node in found.nodes]
        names = [str(name) for name in found.ids or ()]
        texts = [self.kept_text(name) for name in names]
        if names and not any(texts):
            msg = (
                f"{type(self.store).__name__} does not say what is near: it keeps no texts, and its ids are not "
                "nodes' or with_kv_caches got no read="
            )
            raise UnreadableError(msg)
        return texts

    @once
    def _read(self) -> dict[str, BaseNode]:
        """The caller's nodes, by id: what they say is looked at where it is wanted."""
        return {} if self.records.given is None else {node.node_id: node for node in self.records.given()}


def _query(embedding: Any, count: int) -> VectorStoreQuery:
    return VectorStoreQuery(query_embedding=[float(value) for value in embedding], similarity_top_k=count)


def _simple(store: Any, names: Sequence[str]) -> Embeddings:
    held: Embeddings = store.data.embedding_dict
    return held


def _chroma(store: Any, names: Sequence[str]) -> Embeddings:
    found = store._collection.get(ids=list(names), include=["embeddings"])
    return dict(zip(found["ids"], found["embeddings"], strict=True))


_EMBEDDINGS: dict[str, Callable[[Any, Sequence[str]], Embeddings]] = {
    "SimpleVectorStore": _simple,
    "ChromaVectorStore": _chroma,
}
"""By the class's name, for those whose nodes come back without their embeddings: those of these ids, and maybe more."""
