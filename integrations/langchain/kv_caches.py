"""`with_kv_caches`: any LangChain vector store, with the KV caches of its documents kept in step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain.stored_documents import Read, StoredDocuments
from prophetkv_rag.integrations.langchain.vector_store import ProphetKVChroma
from prophetkv_rag.integrations.shared import Call, Framework, Settings, wrap
from prophetkv_rag.vector_stores import Change, Delete, Record, Renewal, StoreLink, Write

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine

S = TypeVar("S")


def with_kv_caches(store: S, engine: ProphetKVEngine, *, name: str | None = None, read: Read | None = None) -> S:
    """Wrap a vector store, or a class of them: a document's KV cache is computed when it is written, dropped with it.

    What is returned is a vector store of the same class (`isinstance` holds) on the same state; use it instead of the
    one that was given. It has one method more: `cache_existing()` computes the caches of what was written before or
    without it, and drops those of what was deleted without it.

    Args:
        store: Any LangChain `VectorStore`, or a class of them, for its `from_texts` and `from_documents`.
        engine: Computes and keeps the caches; the same one that the chat model answers with.
        name: Tells this vector store from others with caches in the same place; the same on every start. Needed where
            the engine's store is on disk and the vector store has no collection's or table's name; by default that.
        read: Returns all documents of the vector store, each with its id; for vector stores that `cache_existing()`
            cannot read by itself.

    Raises:
        InputError: If it is no vector store, has caches already, or needs a name.

    Example:
        ```python
        store = with_kv_caches(InMemoryVectorStore(embeddings), model.engine)
        store = with_kv_caches(FAISS, model.engine, name="docs").from_documents(documents, embeddings)
        ```
    """
    kind = store if isinstance(store, type) else type(store)
    if issubclass(kind, ProphetKVChroma):
        msg = "a ProphetKVChroma keeps its caches in step by itself; use it as it is, or wrap a langchain_chroma.Chroma"
        raise InputError(msg)
    wrapped: S = wrap(store, Settings(FRAMEWORK, kind, engine, name, read))
    return wrapped


def unpickled(store: VectorStore, name: str | None) -> Any:
    """Make a wrapper again of the vector store that its pickle holds; it has no engine yet."""
    return wrap(store, Settings(FRAMEWORK, type(store), None, name, None))


def _add_texts(link: StoreLink, call: Call) -> Change | None:
    texts = list(call.get("texts") or ())
    call.set("texts", texts)
    return _write(link, call, texts)


def _add_embeddings(link: StoreLink, call: Call) -> Change | None:
    if not call.has("text_embeddings"):
        return _add_texts(link, call)
    pairs = list(call.get("text_embeddings"))  # as FAISS has it
    call.set("text_embeddings", pairs)
    return _write(link, call, [text for text, _ in pairs])


def _write(link: StoreLink, call: Call, texts: Sequence[Any]) -> Change | None:
    if not all(isinstance(text, str) for text in texts):
        return None  # the vector store says best what is wrong
    columns: dict[str, list[Any]] = {}
    for name in ("metadatas", "ids"):
        given = call.get(name)
        if given is not None:
            given = list(given)  # it may be read once only
            call.set(name, given)
        # Of another length: refused, or cut short; what is there then is read back.
        columns[name] = given if given and len(given) == len(texts) else [None] * len(texts)
    name_of = link.records.name
    records = [
        Record(name_of(name), text, metadata)
        for name, text, metadata in zip(columns["ids"], texts, columns["metadatas"], strict=True)
    ]
    return _written(link, records)


def _add_documents(link: StoreLink, call: Call) -> Change | None:
    documents = list(call.get("documents") or ())
    call.set("documents", documents)
    return _documents(link, documents, call.get("ids"))


def _documents(link: StoreLink, documents: Sequence[Document], ids: Any) -> Change | None:
    names = [document.id for document in documents] if ids is None else list(ids)
    if len(names) != len(documents):
        names = [None] * len(documents)
    name_of = link.records.name
    records = [
        Record(name_of(name), document.page_content, document.metadata)
        for name, document in zip(names, documents, strict=True)
    ]
    return _written(link, records)


def _update_documents(link: StoreLink, call: Call) -> Change | None:
    return _documents(link, call.get("documents"), call.get("ids"))


def _update_document(link: StoreLink, call: Call) -> Change | None:
    return _documents(link, [call.get("document")], [call.get("document_id")])


def _delete(link: StoreLink, call: Call) -> Change | None:
    ids = call.get("ids")
    if ids is None:
        return Delete(link, None)
    if isinstance(ids, str):
        ids = [ids]  # as some take it
    else:
        ids = list(ids)
        call.set("ids", ids)
    has_filter = any(value is not None for name, value in call.rest.items() if name != "ids")
    return Delete(
        link, lambda: [link.records.name(one) for one in ids], is_sure=lambda done: done is not False and not has_filter
    )


def _delete_all(link: StoreLink, call: Call) -> Change | None:
    return Delete(link, lambda: link.ledger.names(link.owner))


def _renew(link: StoreLink, call: Call) -> Change | None:
    return Renewal(link)


def _written(link: StoreLink, records: Sequence[Record]) -> Change:
    is_overwritten = cast(StoredDocuments, link.records).is_overwritten
    after = link.forget_missing if is_overwritten else None
    return Write(link, records, lambda result: _names(link, result), after=after)


def _names(link: StoreLink, result: Any) -> list[str] | None:
    """Return the ids that a vector store says it has written."""
    is_told = isinstance(result, (list, tuple)) and None not in result
    return [link.records.name(name) for name in result] if is_told else None


def _found(link: StoreLink, result: Any) -> list[str]:
    """Return the keys of documents that a search gave, alone or with scores."""
    documents = [one[0] if isinstance(one, tuple) else one for one in result]
    return [link.engine.key_of(one.page_content) for one in documents if one.page_content.strip()]


_SEARCHES = (
    "similarity_search",
    "similarity_search_by_vector",
    "similarity_search_with_score",
    "max_marginal_relevance_search",
    "max_marginal_relevance_search_by_vector",
)
_CHANGES = {
    "add_texts": _add_texts,
    "add_documents": _add_documents,
    "add_embeddings": _add_embeddings,
    "update_document": _update_document,
    "update_documents": _update_documents,
    "delete": _delete,
    "delete_collection": _delete_all,
    "reset_collection": _delete_all,
    "drop": _delete_all,
    "merge_from": _renew,
    "upsert": _renew,
}

FRAMEWORK = Framework(
    base=VectorStore,
    changes=_CHANGES | {f"a{name}": change for name, change in _CHANGES.items()},
    twins={},  # LangChain's own leave the event loop
    searches=dict.fromkeys([*_SEARCHES, *(f"a{name}" for name in _SEARCHES)], _found),
    makers=("from_texts", "afrom_texts", "from_embeddings", "afrom_embeddings"),
    records=StoredDocuments,
    restore=unpickled,
)
