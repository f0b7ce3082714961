"""The Chroma hook: a collection that keeps a KV cache for every document text it holds.

A proxy, so that LlamaIndex's and LangChain's own Chroma classes work on top of it unchanged. It adds one metadata key
on the way in and strips it on the way out. Caches are stored before Chroma is written and deleted after it, so what a
crash leaves is at worst a cache that nothing uses; a cache that is missing is computed again when a prompt needs it.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from prophetkv_rag.chroma.records import (
    PROPHETKV_ID,
    StoredRecord,
    as_list,
    as_records,
    batches,
    cache_keys,
    column_parts,
    stripped,
    with_key,
)
from prophetkv_rag.chroma.store import default_blob_directory, open_store
from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.store import is_key
from prophetkv_rag.store.disk import writing

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine

__all__ = ["PROPHETKV_ID", "KVCachingCollection", "default_blob_directory", "open_store"]

logger = logging.getLogger(__name__)

_QUERY_SIZE = 1000  # ids or keys in one read; SQLite, behind Chroma, takes at most 32,766 variables
# By collection id: several proxies may wrap one collection. A lock that nobody holds or waits for goes away.
_LOCKS: weakref.WeakValueDictionary[str, threading.RLock] = weakref.WeakValueDictionary()
_LOCKS_GUARD = threading.Lock()


class KVCachingCollection:
    """A chromadb `Collection` whose writes compute chunk caches and whose deletes drop them; all else is delegated.

    A record whose text cannot be a chunk (empty, longer than the model's context window) is written without a cache,
    and logged.

    Args:
        collection: A collection of a persistent, ephemeral or HTTP client (not of an asynchronous one).
        engine: Computes and keeps the caches; its store's directory is the caller's choice, see `open_store`.
        progress: Called with (chunks computed so far, chunks to compute) while a write computes caches.

    Raises:
        InputError: If the collection is one of an asynchronous client.
    """

    def __init__(
        self, collection: Any, engine: ProphetKVEngine, *, progress: Callable[[int, int], None] | None = None
    ) -> None:
        if isinstance(collection, KVCachingCollection):
            collection = collection.collection
        if inspect.iscoroutinefunction(collection.add):
            msg = "collections of an asynchronous Chroma client are not supported; use chromadb.HttpClient"
            raise InputError(msg)
        self.collection: Any = collection
        self.engine = engine
        self.progress = progress
        self.owner = str(collection.id)
        """Who refers to this collection's caches, in the store's words."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "collection":  # asked for before __init__ has run, by copy and pickle
            raise AttributeError(name)
        return getattr(self.collection, name)

    def __repr__(self) -> str:
        return f"KVCachingCollection({self.collection!r})"

    # ---- writes: caches first, then Chroma --------------------------------------------------------------------------

    def add(
        self,
        ids: Any,
        embeddings: Any = None,
        metadatas: Any = None,
        documents: Any = None,
        images: Any = None,
        uris: Any = None,
    ) -> None:
        """As `Collection.add`, which keeps a record that exists already; its old text is what stays cached."""
        self._write("add", ids, metadatas, documents, embeddings=embeddings, images=images, uris=uris)

    def upsert(
        self,
        ids: Any,
        embeddings: Any = None,
        metadatas: Any = None,
        documents: Any = None,
        images: Any = None,
        uris: Any = None,
    ) -> None:
        """As `Collection.upsert`."""
        self._write("upsert", ids, metadatas, documents, embeddings=embeddings, images=images, uris=uris)

    def update(
        self,
        ids: Any,
        embeddings: Any = None,
        metadatas: Any = None,
        documents: Any = None,
        images: Any = None,
        uris: Any = None,
    ) -> None:
        """As `Collection.update`, which ignores ids that do not exist."""
        self._write("update", ids, metadatas, documents, embeddings=embeddings, images=images, uris=uris)

    def cache_existing(self) -> None:
        """Cache every text in the collection: what was written without this proxy, or for another model."""
        with self._lock, self.engine.store.lease([writing(self.owner)]):
            for batch in batches(self.collection.get(include=[])["ids"], _QUERY_SIZE):
                self._renew(self._stored(batch))

    # ---- deletes: Chroma first, then caches -------------------------------------------------------------------------

    def delete(self, ids: Any = None, where: Any = None, where_document: Any = None, **options: Any) -> Any:
        """As `Collection.delete`, except that an empty list of ids is allowed: alone, it deletes nothing.

        Beware: as in Chroma, an empty list of ids *with* a filter deletes everything that passes the filter.
        """
        filters = {"where": where, "where_document": where_document}
        has_filter = where is not None or where_document is not None
        if ids is not None:
            ids = list(dict.fromkeys(as_list(ids)))
            if not ids and not has_filter:
                return {"deleted": 0}
        elif not has_filter:  # Chroma says best what is wrong
            return self.collection.delete(**options)
        parts: list[Any] = list(batches(ids, self._max_batch_size())) if ids and not options else [ids or None]
        results = []
        with self._lock:
            for part in parts:
                doomed = self.collection.get(ids=part, include=["metadatas"], **filters)
                results.append(self.collection.delete(ids=part, **filters, **options))
                self._release(cache_keys(doomed["metadatas"]))
        if len(results) > 1 and results[0] is not None:
            return {"deleted": sum(result["deleted"] for result in results)}
        return results[0]

    def drop(self) -> list[str]:
        """Drop all references of this collection, after `client.delete_collection(name)`.

        Returns:
            Keys of the caches that nobody else refers to and that are deleted now.
        """
        with self._lock:
            return self.engine.remove_chunks(self.engine.store.references(self.owner), owner=self.owner)

    # ---- reads: without our metadata key ----------------------------------------------------------------------------

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """As `Collection.get`."""
        return stripped(self.collection.get(*args, **kwargs))

    def peek(self, *args: Any, **kwargs: Any) -> Any:
        """As `Collection.peek`."""
        return stripped(self.collection.peek(*args, **kwargs))

    def query(self, *args: Any, **kwargs: Any) -> Any:
        """As `Collection.query`; the caches of what is found begin to load at once."""
        found = self.collection.query(*args, **kwargs)
        keys = dict.fromkeys(key for row in found.get("metadatas") or () for key in cache_keys(row))
        self.engine.store.read_ahead(keys, fingerprint=self.engine.identity.fingerprint)
        return stripped(found)

    def search(self, *args: Any, **kwargs: Any) -> Any:
        """As `Collection.search` (Chroma Cloud only)."""
        return stripped(self.collection.search(*args, **kwargs))

    # ---- internals --------------------------------------------------------------------------------------------------

    @property
    def _lock(self) -> threading.RLock:
        """Held while records and references are changed together; other processes are not kept out."""
        with _LOCKS_GUARD:
            lock = _LOCKS.get(self.owner)
            if lock is None:
                lock = _LOCKS[self.owner] = threading.RLock()
            return lock

    def _write(
        self, method: Literal["add", "upsert", "update"], ids: Any, metadatas: Any, documents: Any, **columns: Any
    ) -> None:
        call = getattr(self.collection, method)
        records = as_records(ids, metadatas, documents)
        if records is None:  # Chroma says best what is wrong
            call(ids=ids, metadatas=metadatas, documents=documents, **columns)
            return
        names, metadata_list, document_list = records
        with self._lock, self.engine.store.lease([writing(self.owner)]):
            stored = self._stored(names)
            if method == "add":
                self._renew(stored)
            texts = [  # `add` writes only new records, `update` only existing ones
                text if method == "upsert" or (name in stored) == (method == "update") else None
                for name, text in zip(names, document_list, strict=True)
            ]
            keys: dict[str, str | None] = {}
            try:
                self._cache(texts, keys)
                columns["documents"] = None if documents is None else document_list
                columns["metadatas"] = [
                    with_key(metadata, text, keys, clears=method != "add")
                    for metadata, text in zip(metadata_list, texts, strict=True)
                ]
                for part in batches(range(len(names)), self._max_batch_size()):
                    call(ids=names[part.start : part.stop], **column_parts(columns, part, len(names)))
            except BaseException:  # parts may have been written: neither their old keys nor the others' new ones stay
                self._release_after_error([*keys.values(), *(old.key for old in stored.values())])
                raise
            renewed = [(stored[name], text) for name, text in zip(names, texts, strict=True) if name in stored]
            self._release_if_possible(old.key for old, text in renewed if text is not None and old.key != keys[text])

    def _renew(self, stored: dict[str, StoredRecord]) -> None:
        """Cache the texts that these records hold, and correct the keys that they carry."""
        keys: dict[str, str | None] = {}
        try:
            self._cache([record.document for record in stored.values()], keys)
            wanted = {name: keys.get(record.document or "") for name, record in stored.items()}
            stale = [name for name, record in stored.items() if record.key != wanted[name]]
            for batch in batches(stale, self._max_batch_size()):
                self.collection.update(ids=batch, metadatas=[{PROPHETKV_ID: wanted[name]} for name in batch])
        except BaseException:
            self._release_after_error([*keys.values(), *(record.key for record in stored.values())])
            raise
        self._release_if_possible(stored[name].key for name in stale)

    def _cache(self, texts: Iterable[str | None], keys: dict[str, str | None]) -> None:
        """Fill `keys` (text -> cache key, or `None` if it cannot be a chunk), computing what is missing."""
        wanted = list(dict.fromkeys(text for text in texts if text is not None))
        refused: list[InputError] = []

        def add(part: list[str]) -> None:
            try:
                added: Sequence[str | None] = self.engine.add_chunks(part, owner=self.owner, progress=self.progress)
            except InputError as error:  # about one of them; the engine has stored none
                if len(part) > 1:
                    add(part[: len(part) // 2])
                    add(part[len(part) // 2 :])
                    return
                refused.append(error)
                added = [None]
            keys.update(zip(part, added, strict=True))

        keys.update((text, None) for text in wanted if not text.strip())
        usable = [text for text in wanted if text.strip()]
        if usable:
            add(usable)
        if len(usable) < len(wanted) or refused:
            count = len(wanted) - len(usable) + len(refused)
            reason = refused[0] if refused else "empty"
            logger.warning("%d texts in collection %r get no KV cache: %s", count, self.collection.name, reason)

    def _stored(self, ids: Sequence[str]) -> dict[str, StoredRecord]:
        stored = {}
        for batch in batches(ids, _QUERY_SIZE):
            found = self.collection.get(ids=batch, include=["metadatas", "documents"])
            for name, metadata, document in zip(found["ids"], found["metadatas"], found["documents"], strict=True):
                stored[name] = StoredRecord((metadata or {}).get(PROPHETKV_ID), document)
        return stored

    def _release(self, keys: Iterable[str | None]) -> None:
        """Drop the references to those of these keys that no record of the collection carries."""
        unused = {key for key in keys if key is not None and is_key(key)}
        for batch in batches(sorted(unused), _QUERY_SIZE):
            found = self.collection.get(where={PROPHETKV_ID: {"$in": batch}}, include=["metadatas"])
            unused.difference_update(cache_keys(found["metadatas"]))
        if unused:
            self.engine.remove_chunks(sorted(unused), owner=self.owner)

    def _release_if_possible(self, keys: Iterable[str | None]) -> None:
        """As `_release` after a write that went through: a store that fails leaves caches for `cache gc`."""
        try:
            self._release(keys)
        except (StoreError, OSError) as error:
            self.engine.store.failures.note(error)

    def _release_after_error(self, keys: Iterable[str | None]) -> None:
        try:
            self._release(keys)
        except Exception:  # the first error is the one to show
            logger.warning("caches of a failed write to %r may be left over", self.collection.name, exc_info=True)

    def _max_batch_size(self) -> int:
        return int(self.collection._client.get_max_batch_size())  # a Collection has no public way to its client
