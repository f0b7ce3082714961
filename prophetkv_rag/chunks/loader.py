"""A query's way into the store: a prompt's caches, loaded, or computed again where they are missing or bad."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from prophetkv_rag.chunks.encode import check_length
from prophetkv_rag.chunks.writer import Encode
from prophetkv_rag.prompt import PromptLayout
from prophetkv_rag.report import ChunkStatus, ChunkTier
from prophetkv_rag.store import CacheIdentity, ChunkCache, ChunkStore


class Origin(NamedTuple):
    """Where a chunk's cache came from; see `report.ChunkReport`."""

    status: ChunkStatus
    tier: ChunkTier


class ChunkLoader:
    """Loads the chunks of one identity.

    Args:
        store: Where from; what had to be computed goes back into it.
        identity: Whose caches.
        encode: Runs the model.
        context_window: The model's own.
    """

    def __init__(self, store: ChunkStore, identity: CacheIdentity, encode: Encode, *, context_window: int) -> None:
        self._store = store
        self._identity = identity
        self._encode = encode
        self._context_window = context_window

    def load(
        self, layout: PromptLayout, model_lock: AbstractContextManager[Any]
    ) -> tuple[list[ChunkCache], list[Origin]]:
        """Load the chunks' caches; what is missing or bad is encoded again, exactly as at index time.

        What was encoded is stored if somebody refers to it. A chunk that was never added is encoded for this prompt
        alone. The model runs under `model_lock`.

        Raises:
            ContextWindowError: If a chunk that was never added does not fit the window behind the encoding prefix.
        """
        with self._store.lease({chunk.key for chunk in layout.chunks}):
            return self._load(layout, model_lock)

    def _load(
        self, layout: PromptLayout, model_lock: AbstractContextManager[Any]
    ) -> tuple[list[ChunkCache], list[Origin]]:
        found: dict[str, ChunkCache] = {}
        origins: dict[str, Origin] = {}
        self._store.expect({chunk.key: None for chunk in layout.chunks}, fingerprint=self._identity.fingerprint)
        for chunk in layout.chunks:
            if chunk.key in origins:
                continue
            cache, was_corrupt, tier = self._store.find(
                chunk.key, fingerprint=self._identity.fingerprint, input_ids=chunk.input_ids
            )
            if cache is not None and not cache.is_of(self._identity.dtype):
                self._store.reject(
                    chunk.key,
                    fingerprint=self._identity.fingerprint,
                    input_ids=chunk.input_ids,
                    dtype=self._identity.dtype,
                )
                cache, was_corrupt = None, True
            if cache is not None:
                found[chunk.key] = cache
                origins[chunk.key] = Origin("hit", tier or "")
            else:
                origins[chunk.key] = Origin("corrupt" if was_corrupt else "miss", "computed")
        wanted = {chunk.key: chunk for chunk in layout.chunks if chunk.key not in found}
        if wanted:
            keys = list(wanted)
            for number, chunk in enumerate(layout.chunks):
                if chunk.key in wanted:
                    check_length(
                        f"chunk {number} of the prompt",
                        chunk.input_ids,
                        self._identity.prefix_ids,
                        self._context_window,
                    )
            with model_lock:
                encoded = list(self._encode([wanted[key].input_ids for key in keys]))
            for index, cache in encoded:
                found[keys[index]] = cache
                self._store.put_soon(keys[index], cache, fingerprint=self._identity.fingerprint)
        return [found[chunk.key] for chunk in layout.chunks], [origins[chunk.key] for chunk in layout.chunks]
