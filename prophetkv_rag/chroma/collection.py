"""The Chroma hook: a collection that keeps a KV cache for every document text it holds.

A proxy, so that LlamaIndex's and LangChain's own Chroma classes work on top of it unchanged. It adds one metadata key
on the way in and strips it on the way out. Caches are stored before Chroma is written and deleted after it, so what a
crash leaves is at worst a cache that nothing uses; a cache that is missing is computed again when a prompt needs it.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Sequence
from typing import Any, Literal

from prophetkv_rag.chroma.caches import CollectionCaches
from prophetkv_rag.chroma.locks import collection_lock
from prophetkv_rag.chroma.near import NearInChroma
from prophetkv_rag.chroma.records import (
    as_list,
    as_records,
    asked,
    cache_keys,
    column_parts,
    stripped,
    with_key,
)
from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.store.disk import writing
from prophetkv_rag.vector_stores import QUERY_SIZE, CachingEngine, NeighbourPass, Progress, Record, batches


class KVCachingCollection:
    """A chromadb `Collection` whose writes compute chunk caches and whose deletes drop them; all else is delegated.

    A record whose text cannot be a chunk (empty, longer than the model's context window) is written without a cache,
    and logged.

    Args:
        collection: A collection of a persistent, ephemeral or HTTP client (not of an asynchronous one).
        engine: Computes and keeps the caches; its store's directory is the caller's choice, see `open_store`.
        progress: Called with (chunks computed so far, chunks to compute) while a write computes caches.
        in_background: Whether a thread encodes what is written behind its neighbours, where the engine's encoding is
            that; else `encode_behind_neighbours` is to be called.

    Raises:
        InputError: If the collection is one of an asynchronous client.
    """

    def __init__(
        self, collection: Any, engine: CachingEngine, *, progress: Progress = None, in_background: bool = True
    ) -> None:
        if isinstance(collection, KVCachingCollection):
            collection = collection.collection
        if inspect.iscoroutinefunction(collection.add):
            msg = "collections of an asynchronous Chroma client are not supported; use chromadb.HttpClient"
            raise InputError(msg)
        self._collection: Any = collection
        self._pid = os.getpid()
        self.engine = engine
        self.progress = progress
        self.in_background = in_background
        self.owner = str(collection.id)
        """Who refers to this collection's caches, in the store's words."""
        self._caches = CollectionCaches(collection, engine, self.owner)
        self._neighbours = NeighbourPass(
            engine, self.owner, f"collection {collection.name!r}", lambda: collection_lock(self.owner)
        )

    @property
    def collection(self) -> Any:
        """The plain collection.

        Raises:
            StoreError: If this process is a fork of the one that the proxy was made in: of a local client, Chroma's
                threads are not here and every call would hang; of an HTTP client, both would read from one socket.
        """
        if os.getpid() != self._pid:
            msg = (
                "this Chroma collection was opened before the process was forked, and Chroma cannot go on in the "
                "child: make the Chroma client and the collection after the fork, in each process (gunicorn without "
                "--preload; Celery in worker_process_init), and no local client before it"
            )
            raise StoreError(msg)
        return self._collection

    def __getattr__(self, name: str) -> Any:
        # Our own are asked for before __init__ has run, by copy and pickle.
        if name.startswith("__") or name in ("collection", "_collection", "_pid"):
            raise AttributeError(name)
        return getattr(self.collection, name)

    def __repr__(self) -> str:
        return f"KVCachingCollection({self._collection!r})"

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
            for batch in batches(self.collection.get(include=[])["ids"], QUERY_SIZE):
                self._caches.renew(self._caches.stored(batch), self.progress)

    def encode_behind_neighbours(self, progress: Progress = None, *, refresh: bool = False) -> None:
        """Encode every text of the collection behind its nearest neighbours, where the engine's encoding is that.

        A write does that for its own records, in a thread; this waits for it, and does what is left.

        Args:
            progress: Called with (records looked at so far, all of them).
            refresh: Also encode anew what stands behind others than most of its neighbours of today.
        """
        if self._neighbours.is_wanted:
            self._neighbours.wait()
            self._neighbours.run(self.collection.get(include=[])["ids"], self._near, progress, refresh=refresh)

    def _near(self, _names: Sequence[str] = ()) -> NearInChroma:
        return NearInChroma(self.collection)

    # ---- deletes: Chroma first, then caches -------------------------------------------------------------------------

    def delete(self, ids: Any = None, where: Any = None, where_document: Any = None, **options: Any) -> Any:
        """As `Collection.delete`, except that an empty list of ids is allowed: alone, it deletes nothing.

        Beware: as in Chroma, an empty list of ids *with* a filter deletes everything that passes the filter.
        """
        filters = asked({"where": where, "where_document": where_document})
        has_filter = where is not None or where_document is not None
        if ids is not None:
            ids = list(dict.fromkeys(as_list(ids)))
            if not ids and not has_filter:
                return {"deleted": 0}
        elif not has_filter:  # Chroma says best what is wrong
            return self.collection.delete(**options)
        parts: list[Any] = list(batches(ids, self._caches.max_batch_size())) if ids and not options else [ids or None]
        results = []
        with self._lock:
            for part in parts:
                doomed = self.collection.get(ids=part, include=["metadatas"], **filters)
                results.append(self.collection.delete(ids=part, **filters, **options))
                self._caches.release(cache_keys(doomed["metadatas"]))
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
        return stripped(self.collection.get(*args, **asked(kwargs)))

    def peek(self, *args: Any, **kwargs: Any) -> Any:
        """As `Collection.peek`."""
        return stripped(self.collection.peek(*args, **kwargs))

    def query(self, *args: Any, **kwargs: Any) -> Any:
        """As `Collection.query`; the caches of what is found begin to load at once."""
        found = self.collection.query(*args, **asked(kwargs))
        self.engine.library.read_ahead([cache_keys(row) for row in found.get("metadatas") or ()])
        return stripped(found)

    def search(self, *args: Any, **kwargs: Any) -> Any:
        """As `Collection.search` (Chroma Cloud only)."""
        return stripped(self.collection.search(*args, **kwargs))

    # ---- internals --------------------------------------------------------------------------------------------------

    @property
    def _lock(self) -> threading.RLock:
        return collection_lock(self.owner)

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
            stored = self._caches.stored(names)
            if method == "add":
                self._caches.renew(stored, self.progress)
            texts = [  # `add` writes only new records, `update` only existing ones
                text if method == "upsert" or (name in stored) == (method == "update") else None
                for name, text in zip(names, document_list, strict=True)
            ]
            keys: dict[str, str | None] = {}
            try:
                written = [Record(*record) for record in zip(names, texts, metadata_list, strict=True)]
                before = self._caches.before(written, is_one_call=True)
                self._caches.compute(texts, keys, self.progress, before)
                columns["documents"] = None if documents is None else document_list
                columns["metadatas"] = [
                    with_key(metadata, text, keys, clears=method != "add")
                    for metadata, text in zip(metadata_list, texts, strict=True)
                ]
                for part in batches(range(len(names)), self._caches.max_batch_size()):
                    call(ids=names[part.start : part.stop], **column_parts(columns, part, len(names)))
            except BaseException:  # parts may have been written: neither their old keys nor the others' new ones stay
                self._caches.release_after_error([*keys.values(), *(old.key for old in stored.values())])
                raise
            renewed = [(stored[name], text) for name, text in zip(names, texts, strict=True) if name in stored]
            self._caches.release_if_possible(
                old.key for old, text in renewed if text is not None and old.key != keys[text]
            )
        if self.in_background and self._neighbours.is_wanted and any(keys.values()):
            self._neighbours.later(names, self._near)
