"""A collection's caches, kept in step with its records; Chroma itself knows which of them carries which cache's key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prophetkv_rag.chroma.records import PROPHETKV_ID, StoredRecord, cache_keys
from prophetkv_rag.vector_stores import QUERY_SIZE, CachingEngine, OwnedCaches, Progress, Record, batches


class CollectionCaches(OwnedCaches):
    """What the engine's store keeps for one collection. The caller holds the collection's lock.

    Args:
        collection: A chromadb collection.
        engine: Computes and keeps the caches.
        owner: Who refers to them, in the store's words.
    """

    def __init__(self, collection: Any, engine: CachingEngine, owner: str) -> None:
        super().__init__(engine, owner, f"collection {collection.name!r}")
        self.collection = collection

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

    def fetch(self, names: Sequence[str]) -> list[Record]:
        """See `OwnedCaches.fetch`."""
        return [Record(name, found.document, found.metadata) for name, found in self.stored(names).items()]

    def carried(self, keys: Sequence[str]) -> set[str]:
        """See `OwnedCaches.carried`."""
        found = self.collection.get(where={PROPHETKV_ID: {"$in": list(keys)}}, include=["metadatas"])
        return set(cache_keys(found["metadatas"]))

    def stored(self, ids: Sequence[str]) -> dict[str, StoredRecord]:
        """Return what the collection holds under these ids."""
        stored = {}
        for batch in batches(ids, QUERY_SIZE):
            found = self.collection.get(ids=batch, include=["metadatas", "documents"])
            for name, metadata, document in zip(found["ids"], found["metadatas"], found["documents"], strict=True):
                stored[name] = StoredRecord((metadata or {}).get(PROPHETKV_ID), document, metadata)
        return stored

    def max_batch_size(self) -> int:
        """Return how many records Chroma takes in one call."""
        return int(self.collection._client.get_max_batch_size())  # a Collection has no public way to its client
