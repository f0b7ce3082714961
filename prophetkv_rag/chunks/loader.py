"""A query's way into the store: a prompt's caches, loaded, or computed again where they are missing or bad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from prophetkv_rag.chunks.encode import check_length
from prophetkv_rag.chunks.encoder import ChunkEncoder
from prophetkv_rag.errors import StoreError
from prophetkv_rag.prompt import ChunkSpan
from prophetkv_rag.report import ChunkStatus, ChunkTier
from prophetkv_rag.store import ChunkCache, ChunkStore


class Origin(NamedTuple):
    """Where a chunk's cache came from; see `report.ChunkReport`."""

    status: ChunkStatus
    tier: ChunkTier
    behind: int = 0


class LoadedChunks(NamedTuple):
    """A prompt's caches and where they came from, in order, and whether the first is exact: as full prefill has it."""

    caches: list[ChunkCache]
    origins: list[Origin]
    has_exact_first: bool


class ChunkLoader:
    """Loads the chunks of one identity.

    Args:
        store: Where from; what had to be computed goes back into it.
        encoder: Runs the model for the identity's chunks.
    """

    def __init__(self, store: ChunkStore, encoder: ChunkEncoder) -> None:
        self._store = store
        self._identity = encoder.identity
        self._encoder = encoder
        self._context_window = encoder.context_window

    def load(
        self, chunks: Sequence[ChunkSpan], model_lock: AbstractContextManager[Any]
    ) -> tuple[list[ChunkCache], list[Origin]]:
        """Load the caches of a prompt's chunks; what is missing or bad is encoded again, exactly as at index time.

        So is what bears the trace of a chunk that was deleted since; that is encoded without it.

        What was encoded is stored if somebody refers to it. A chunk that was never added is encoded for this prompt
        alone. The model runs under `model_lock`.

        Raises:
            ContextWindowError: If a chunk that was never added does not fit the window behind the encoding prefix.
        """
        with self._store.lease({chunk.key for chunk in chunks}):
            return self._load(chunks, model_lock)

    def _load(
        self, chunks: Sequence[ChunkSpan], model_lock: AbstractContextManager[Any]
    ) -> tuple[list[ChunkCache], list[Origin]]:
        found: dict[str, ChunkCache] = {}
        origins: dict[str, Origin] = {}
        self._store.expect({chunk.key: None for chunk in chunks}, fingerprint=self._identity.fingerprint)
        for chunk in chunks:
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
                origins[chunk.key] = Origin("hit", tier or "", len(cache.behind.keys))
            else:
                origins[chunk.key] = Origin("corrupt" if was_corrupt else "miss", "computed")
        for key in self._stale(found):
            del found[key]
            origins[key] = Origin("miss", "computed")
        wanted = {chunk.key: chunk.input_ids for chunk in chunks if chunk.key not in found}
        if wanted:
            for number, chunk in enumerate(chunks):
                if chunk.key in wanted:
                    check_length(
                        f"chunk {number} of the prompt",
                        chunk.input_ids,
                        self._identity.prefix_ids,
                        self._context_window,
                    )
            with model_lock:
                encoded = self._encode(wanted)
            for key, cache in encoded.items():
                found[key] = cache
                origins[key] = origins[key]._replace(behind=len(cache.behind.keys))
                self._store.put_soon(key, cache, fingerprint=self._identity.fingerprint)
        return [found[chunk.key] for chunk in chunks], [origins[chunk.key] for chunk in chunks]

    def _stale(self, found: Mapping[str, ChunkCache]) -> list[str]:
        """Drop, and return, the caches that bear the trace of a chunk that is not known any more."""
        traces = {key: set(cache.behind.traces) for key, cache in found.items() if cache.behind.keys}
        if not traces:
            return []
        try:
            known = self._store.known(set().union(*traces.values()))
        except StoreError:  # who cannot tell does not use them
            known = set()
        stale = [key for key, needed in traces.items() if not needed <= known]
        self._store.drop_caches(stale)
        return stale

    def _encode(self, wanted: Mapping[str, Sequence[int]]) -> dict[str, ChunkCache]:
        """Encode chunks as they were, or the plain way where what they stood behind is gone."""
        encoded: dict[str, ChunkCache] = {}
        for key, input_ids in wanted.items():
            again = self._encoder.encode_again(key, input_ids)
            if again is not None:
                encoded[key] = again
        plain = [key for key in wanted if key not in encoded]
        for index, cache in self._encoder.encode([wanted[key] for key in plain]):
            encoded[plain[index]] = cache
        return encoded
