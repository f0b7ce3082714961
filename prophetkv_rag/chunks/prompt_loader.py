"""A prompt's first chunk by a cache of its own, encoded behind the prompt's opening alone: full prefill's very rows.

Chunks that were encoded behind more than that (a lead-in, other chunks) fit better in the middle of a prompt, and worse
at its start, where usually the nearest passage stands. So that one chunk gets a second cache, when a prompt first has
it first. It is found as the cache of an engine would be that encodes chunks behind the opening alone, and is kept for
as long as its chunk is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from prophetkv_rag.chunks.encoder import ChunkEncoder
from prophetkv_rag.chunks.loader import ChunkLoader, LoadedChunks, Origin
from prophetkv_rag.config import FirstChunk, parse_encoding
from prophetkv_rag.errors import StoreError
from prophetkv_rag.prompt import ChunkSpan, PromptLayout
from prophetkv_rag.store import CacheIdentity, ChunkCache, ChunkStore, chunk_owner


class PromptLoader:
    """Loads the caches of prompts, the first chunk's from its own cache where that is wanted.

    Args:
        store: Where from; what had to be computed goes back into it.
        encoder: Of the chunks as they are encoded otherwise.
        opening: Identity of second caches: a prompt has its prefix, too, and nothing else stands before the chunk.
    """

    def __init__(self, store: ChunkStore, encoder: ChunkEncoder, opening: CacheIdentity) -> None:
        self._store = store
        self._identity = encoder.identity
        self._opening = opening
        self._loader = ChunkLoader(store, encoder)
        prefix = encoder.prefix and encoder.prefix.first(len(opening.prefix_ids))
        self._encoder = encoder.behind_prefix(prefix, opening, parse_encoding("plain"))
        self._first = ChunkLoader(store, self._encoder)

    def load(
        self, layout: PromptLayout, model_lock: AbstractContextManager[Any], first_chunk: FirstChunk
    ) -> LoadedChunks:
        """Load a prompt's caches; see `ChunkLoader.load`.

        Args:
            layout: The prompt.
            model_lock: Held while the model runs.
            first_chunk: `"cached"` takes the first one as the others; else it comes from its second cache, unless the
                one that it has anyway was encoded so.
        """
        chunks = layout.chunks
        if not chunks:
            return LoadedChunks([], [], has_exact_first=False)
        is_behind_opening = tuple(layout.input_ids[: layout.context_start].tolist()) == self._opening.prefix_ids
        if first_chunk != "cached" and not self._is_encoded_so(chunks[0].key):
            others = dict.fromkeys(chunk.key for chunk in chunks[1:])
            self._store.expect(others, fingerprint=self._identity.fingerprint)  # they come while the first is read
            first, origin = self._load_first(chunks[0], model_lock)
            caches, origins = self._loader.load(chunks[1:], model_lock)
            return LoadedChunks([first, *caches], [origin, *origins], has_exact_first=is_behind_opening)
        caches, origins = self._loader.load(chunks, model_lock)
        is_exact = is_behind_opening and self._identity.prefix_ids == self._opening.prefix_ids
        return LoadedChunks(caches, origins, has_exact_first=is_exact and not caches[0].behind.keys)

    def missing_second(self, key: str, input_ids: Sequence[int]) -> str | None:
        """Return the key of a chunk's second cache, kept with it from now on; `None` if it needs none or has it.

        Args:
            key: The chunk's.
            input_ids: Its tokens.
        """
        own = self._opening.key(input_ids)
        if self._is_encoded_so(key) or self._is_stored(own):
            return None
        self._store.keep_with(own, key)
        return own

    def encode_second(self, chunks: Mapping[str, Sequence[int]]) -> Iterator[tuple[int, ChunkCache]]:
        """Encode second caches; yields (index into `chunks`, cache). The caller holds the model's lock."""
        return self._encoder.encode(list(chunks.values()))

    def read_ahead(self, rows: Iterable[Sequence[str]]) -> None:
        """Begin to load what prompts will want.

        Args:
            rows: Keys of the chunks that each retrieval found, best first; the best is likely to come first in its
                prompt, and is loaded from its second cache as well, where it has one.
        """
        rows = [row for row in rows if row]
        try:
            second = [key for row in rows for key in self._store.references(chunk_owner(row[0]))]
        except StoreError:
            second = []
        self._store.read_ahead(second, fingerprint=self._opening.fingerprint)
        chunks = dict.fromkeys(key for row in rows for key in row)
        self._store.read_ahead(chunks, fingerprint=self._identity.fingerprint)

    def _is_encoded_so(self, key: str) -> bool:
        """Whether the cache that a chunk has anyway was encoded behind the opening alone."""
        if self._identity.prefix_ids != self._opening.prefix_ids:
            return False
        try:
            return not self._identity.encoding or not self._store.behind(key).keys
        except StoreError:
            return False

    def _load_first(self, chunk: ChunkSpan, model_lock: AbstractContextManager[Any]) -> tuple[ChunkCache, Origin]:
        own = replace(chunk, key=self._opening.key(chunk.input_ids))
        if not self._is_stored(own.key):
            self._store.keep_with(own.key, chunk.key)
        (cache,), (origin,) = self._first.load([own], model_lock)
        return cache, origin

    def _is_stored(self, key: str) -> bool:
        try:
            return key in self._store
        except StoreError:  # where nothing can be read, nothing can be noted
            return True
