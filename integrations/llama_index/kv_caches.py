"""`with_kv_caches`: any LlamaIndex vector store, with the KV caches of its nodes kept in step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llama_index.core.vector_stores.types import BasePydanticVectorStore, VectorStoreQueryResult

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index.altered import forget_altered
from prophetkv_rag.integrations.llama_index.stored_nodes import Read, StoredNodes, as_record
from prophetkv_rag.integrations.llama_index.vector_store import ProphetKVChromaVectorStore
from prophetkv_rag.integrations.shared import Call, Framework, Settings, wrap
from prophetkv_rag.vector_stores import Change, Delete, StoreLink, Write

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine

S = TypeVar("S")


def with_kv_caches(store: S, engine: ProphetKVEngine, *, name: str | None = None, read: Read | None = None) -> S:
    """Wrap a vector store, or a class of them: a node's KV cache is computed when it is written, dropped with it.

    What is returned is a vector store of the same class (`isinstance` holds) on the same state; use it instead of the
    one that was given. It has one method more: `cache_existing()` computes the caches of what was written before or
    without it, and drops those of what was deleted without it.

    Async methods that the vector store does not have itself run in a thread; LlamaIndex would block the event loop.

    Args:
        store: Any LlamaIndex `BasePydanticVectorStore`, or a class of them.
        engine: Computes and keeps the caches; the same one that `ProphetKVLLM` answers with.
        name: Tells this vector store from others with caches in the same place; the same on every start. Needed where
            the engine's store is on disk and the vector store has no collection's or table's name; by default that.
        read: Returns all nodes of the vector store; for those that keep no texts (`SimpleVectorStore`, FAISS):
            `lambda: index.docstore.docs.values()`.

    Raises:
        InputError: If it is no vector store, has caches already, or needs a name.

    Example:
        ```python
        vector_store = with_kv_caches(QdrantVectorStore("docs", client=client), llm.engine)
        storage = StorageContext.from_defaults(vector_store=vector_store)
        ```
    """
    kind = store if isinstance(store, type) else type(store)
    if issubclass(kind, ProphetKVChromaVectorStore):
        msg = (
            "a ProphetKVChromaVectorStore keeps its caches in step by itself; use it as it is, or wrap a "
            "ChromaVectorStore"
        )
        raise InputError(msg)
    wrapped: S = wrap(store, Settings(FRAMEWORK, kind, engine, name, read))
    return wrapped


def unpickled(store: BasePydanticVectorStore, name: str | None) -> Any:
    """Make a wrapper again of the vector store that its pickle holds; it has no engine yet."""
    return wrap(store, Settings(FRAMEWORK, type(store), None, name, None))


def _add(link: StoreLink, call: Call) -> Change:
    nodes = list(call.get("nodes"))
    call.set("nodes", nodes)
    return Write(link, [as_record(node) for node in nodes], after=_forgetter(link, [node.node_id for node in nodes]))


def _delete(link: StoreLink, call: Call) -> Change:
    document, nodes = str(call.get("ref_doc_id")), cast(StoredNodes, link.records)
    return Delete(
        link,
        lambda: link.ledger.of_document(link.owner, document),
        is_sure=lambda _: not nodes.shows_ids,  # FAISS's with a map takes a node's id for it
        after=_forgetter(link, [document]),
    )


def _delete_nodes(link: StoreLink, call: Call) -> Change:
    names, filters = call.get("node_ids"), call.get("filters")
    if names is not None:
        names = list(names)
        call.set("node_ids", names)
    return Delete(
        link,
        None if names is None else lambda: names,
        is_sure=lambda _: filters is None,
        after=_forgetter(link, None if names is None else names),
    )


def _clear(link: StoreLink, call: Call) -> Change:
    return Delete(link, lambda: link.ledger.names(link.owner), after=_forgetter(link, None))


def _forgetter(link: StoreLink, names: Iterable[str] | None) -> Callable[[], None]:
    return lambda: forget_altered(link.engine, names)


def _found(link: StoreLink, result: VectorStoreQueryResult) -> list[str]:
    """Return the keys of nodes that a query gave, also of a vector store that has their ids alone."""
    if result.nodes:
        texts = [as_record(node).text or "" for node in result.nodes]
        return [link.engine.key_of(text) for text in texts if text.strip()]
    return link.ledger.keys(link.owner, result.ids or [])


FRAMEWORK = Framework(
    base=BasePydanticVectorStore,
    changes={
        "add": _add,
        "async_add": _add,
        "delete": _delete,
        "adelete": _delete,
        "delete_nodes": _delete_nodes,
        "adelete_nodes": _delete_nodes,
        "clear": _clear,
        "aclear": _clear,
    },
    twins={
        "async_add": "add",
        "adelete": "delete",
        "adelete_nodes": "delete_nodes",
        "aclear": "clear",
        "aquery": "query",
        "aget_nodes": "get_nodes",
    },
    searches=dict.fromkeys(["query", "aquery"], _found),
    makers=(),  # none of them writes nodes
    records=StoredNodes,
    restore=unpickled,
)
