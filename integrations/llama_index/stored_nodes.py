"""What LlamaIndex's vector stores hold: by id, as far as they tell, and all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode, NodeRelationship
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_index.core.vector_stores.utils import metadata_dict_to_node

from prophetkv_rag.integrations.llama_index.near import NearNodes
from prophetkv_rag.vector_stores import QUERY_SIZE, Record, UnreadableError, behind_node

Read = Callable[[], Iterable[BaseNode]]
"""Returns every node of a vector store."""


class StoredNodes:
    """The nodes of one vector store, as records.

    Args:
        store: The vector store.
        given: The caller's way to read all of it; `None` for ours.
    """

    def __init__(self, store: BasePydanticVectorStore, given: Read | None) -> None:
        self.store = store
        self.given = given
        kinds = [kind.__name__ for kind in type(store).__mro__]
        self._ids = next((_IDS[kind] for kind in kinds if kind in _IDS), None)
        self.reader = next((_READERS[kind] for kind in kinds if kind in _READERS), _get_nodes)

    @property
    def shows_ids(self) -> bool:
        """Whether it is seen at once which nodes there are."""
        return self._ids is not None

    @property
    def is_of_one_thread(self) -> bool:
        """See `Records.is_of_one_thread`: whether it is one connection to a database."""
        return any(kind.__name__ == "DuckDBVectorStore" for kind in type(self.store).__mro__)

    def name(self, given: Any) -> str:
        """Return an id as the vector store gives it back; "" for none."""
        return "" if given is None else str(given)

    def read(self, names: Sequence[str]) -> list[Record]:
        """Return the nodes with these ids."""
        if self._ids is not None:
            there = self._ids(self.store)
            return [Record(name, None, None) for name in names if name in there]
        if not names:
            return []
        if self.reader is _lancedb:
            msg = "LanceDBVectorStore.get_nodes may leave some out"
            raise UnreadableError(msg)
        try:
            return [as_record(node) for node in self.store.get_nodes(node_ids=list(names))]
        except Exception as error:
            msg = f"{type(self.store).__name__}.get_nodes: {str(error) or type(error).__name__}"
            raise UnreadableError(msg) from error

    def read_all(self) -> Iterator[Record]:
        """Return every node; where the vector store does not keep texts, only those of the caller's have one."""
        if self.given is not None:
            return self._readable()
        if self._ids is not None:
            return (Record(name, None, None) for name in list(self._ids(self.store)))
        try:
            return iter([as_record(node) for node in self.reader(self.store)])
        except Exception as error:
            msg = (
                f"{type(self.store).__name__} does not say what it holds ({str(error) or type(error).__name__}); give "
                "with_kv_caches(..., read=...) a function that returns its nodes, such as lambda: "
                "index.docstore.docs.values()"
            )
            raise UnreadableError(msg) from error

    def neighbourhood(self, written: Sequence[Record]) -> NearNodes:
        """See `Records.neighbourhood`."""
        return NearNodes(self, self.store, written)

    def _readable(self) -> Iterator[Record]:
        """What the caller returns, without what the vector store is known not to have (a docstore may have more)."""
        assert self.given is not None
        there = None if self._ids is None else set(self._ids(self.store))
        for node in self.given():
            if there is None or node.node_id in there:
                yield as_record(node)


def as_record(node: BaseNode) -> Record:
    """Return a node as a record; what it says of the node before it goes along."""
    previous = node.relationships.get(NodeRelationship.PREVIOUS)
    return Record(
        node.node_id,
        node.get_content(metadata_mode=MetadataMode.NONE),
        behind_node(getattr(previous, "node_id", None)),
        node.ref_doc_id or "",
        node.embedding,
    )


def _get_nodes(store: Any) -> Iterable[BaseNode]:
    nodes: Iterable[BaseNode] = store.get_nodes(None)
    return nodes


def _lancedb(store: Any) -> Iterator[BaseNode]:
    """As `get_nodes`, which may end after ten."""
    if store._table is not None:  # made by the first write
        query = store.table.search().select([store.text_key, "metadata"])
        for held in query.limit(store.table.count_rows()).to_list():
            yield metadata_dict_to_node(held["metadata"], text=held[store.text_key])


def _milvus(store: Any) -> Iterator[BaseNode]:
    """As `get_nodes`, which wants ids or filters."""
    found = store.client.query_iterator(store.collection_name, batch_size=QUERY_SIZE, output_fields=["*"])
    while part := found.next():
        yield from (metadata_dict_to_node(held, text=held.get(store.text_key)) for held in part)


def _qdrant(store: Any) -> Iterator[BaseNode]:
    """As `get_nodes`, which ends after 9,999."""
    offset = None
    while store.client.collection_exists(store.collection_name):
        points, offset = store.client.scroll(store.collection_name, limit=QUERY_SIZE, offset=offset, with_vectors=True)
        yield from store.parse_to_query_result(points).nodes
        if offset is None:
            return


_READERS: dict[str, Callable[[Any], Iterable[BaseNode]]] = {
    "QdrantVectorStore": _qdrant,
    "LanceDBVectorStore": _lancedb,
    "MilvusVectorStore": _milvus,
}
_IDS: dict[str, Callable[[Any], Any]] = {
    "SimpleVectorStore": lambda store: store.data.embedding_dict,
    "FaissMapVectorStore": lambda store: store._node_id_to_faiss_id_map,
}
"""By the class's name, for those that keep no texts: what has the ids of their nodes."""
