"""A collection's caches, kept in step with its records: computed for the texts it holds, let go of with their keys."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prophetkv_rag.chroma.document_order import Record, previous_texts, tells_order
from prophetkv_rag.chroma.records import PROPHETKV_ID, StoredRecord, batches, cache_keys
from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.store import is_key

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine

logger = logging.getLogger(__name__)

QUERY_SIZE = 1000
"""Ids or keys in one read; SQLite, behind Chroma, takes at most 32,766 variables."""

Progress = Callable[[int, int], None] | None
"""Called with (chunks computed so far, chunks to compute)."""


class CollectionCaches:
    """What the engine's store keeps for one collection. The caller holds the collection's lock.

    Args:
        collection: A chromadb collection.
        engine: Computes and keeps the caches.
        owner: Who refers to them, in the store's words.
    """

    def __init__(self, collection: Any, engine: ProphetKVEngine, owner: str) -> None:
        self.collection = collection
        self.engine = engine
        self.owner = owner
        self._has_told = False

    def renew(self, stored: dict[str, StoredRecord], progress: Progress) -> None:
        """Cache the texts that these records hold, and correct the keys that they carry."""
        keys: dict[str, str | None] = {}
        try:
            records = [Record(name, record.document, record.metadata) for name, record in stored.items()]
            before = self.before(records, is_one_call=False)
            self.compute([record.document for record in stored.values()], keys, progress, before)
            wanted = {name: keys.get(record.document or "") for name, record in stored.items()}
            stale = [name for name, record in stored.items() if record.key != wanted[name]]
            for batch in batches(stale, self.max_batch_size()):
                self.collection.update(ids=batch, metadatas=[{PROPHETKV_ID: wanted[name]} for name in batch])
        except BaseException:
            self.release_after_error([*keys.values(), *(record.key for record in stored.values())])
            raise
        self.release_if_possible(stored[name].key for name in stale)

    def before(self, records: Sequence[Record], *, is_one_call: bool) -> dict[str, list[str]]:
        """Return the texts before each text in its document, where chunks are encoded behind those."""
        encoding = self.engine.library.encoding
        if encoding.kind != "previous":
            return {}
        is_one_call = is_one_call and encoding.is_order_guessed
        found = previous_texts(records, encoding.count, self._fetch, is_one_call=is_one_call)
        if (
            len(records) > 1
            and encoding.is_order_guessed
            and not (is_one_call or tells_order(records) or self._has_told)
        ):
            self._has_told = True
            logger.warning(
                "the records of collection %r do not say in which order they stand in their documents: chunks are "
                "encoded alone (encoding %s)",
                self.collection.name,
                encoding,
            )
        return found

    def _fetch(self, names: Sequence[str]) -> list[Record]:
        return [Record(name, found.document, found.metadata) for name, found in self.stored(names).items()]

    def compute(
        self,
        texts: Iterable[str | None],
        keys: dict[str, str | None],
        progress: Progress,
        before: Mapping[str, Sequence[str]],
    ) -> None:
        """Fill `keys` (text -> cache key, or `None` if it cannot be a chunk), computing what is missing.

        `before` says which texts stand before a text in its document.
        """
        wanted = list(dict.fromkeys(text for text in texts if text is not None))
        refused: list[InputError] = []

        def add(part: list[str]) -> None:
            try:
                behind = [before.get(text, ()) for text in part]
                added: Sequence[str | None] = self.engine.add_chunks(
                    part, owner=self.owner, behind=behind, progress=progress
                )
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

    def stored(self, ids: Sequence[str]) -> dict[str, StoredRecord]:
        """Return what the collection holds under these ids."""
        stored = {}
        for batch in batches(ids, QUERY_SIZE):
            found = self.collection.get(ids=batch, include=["metadatas", "documents"])
            for name, metadata, document in zip(found["ids"], found["metadatas"], found["documents"], strict=True):
                stored[name] = StoredRecord((metadata or {}).get(PROPHETKV_ID), document, metadata)
        return stored

    def release(self, keys: Iterable[str | None]) -> None:
        """Drop the references to those of these keys that no record of the collection carries."""
        unused = {key for key in keys if key is not None and is_key(key)}
        for batch in batches(sorted(unused), QUERY_SIZE):
            found = self.collection.get(where={PROPHETKV_ID: {"$in": batch}}, include=["metadatas"])
            unused.difference_update(cache_keys(found["metadatas"]))
        if unused:
            self.engine.remove_chunks(sorted(unused), owner=self.owner)

    def release_if_possible(self, keys: Iterable[str | None]) -> None:
        """As `release` after a write that went through: a store that fails leaves caches for `cache gc`."""
        try:
            self.release(keys)
        except (StoreError, OSError) as error:
            self.engine.store.failures.note(error)

    def release_after_error(self, keys: Iterable[str | None]) -> None:
        """As `release` after a write that failed; never raises an error of its own."""
        try:
            self.release(keys)
        except Exception:  # the first error is the one to show
            logger.warning("caches of a failed write to %r may be left over", self.collection.name, exc_info=True)

    def max_batch_size(self) -> int:
        """Return how many records Chroma takes in one call."""
        return int(self.collection._client.get_max_batch_size())  # a Collection has no public way to its client
