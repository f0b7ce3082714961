"""The chunks of one model that an engine knows: how they are encoded, and the caches of those that prompts have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prophetkv_rag.chunks.adding import AddProgress, AddsChunks
from prophetkv_rag.chunks.encode import EncodingPrefix, check_length
from prophetkv_rag.chunks.encoder import ChunkEncoder
from prophetkv_rag.chunks.loader import LoadedChunks
from prophetkv_rag.chunks.prompt_loader import PromptLoader
from prophetkv_rag.chunks.writer import ChunkWriter, Wanted
from prophetkv_rag.config import Encoding, FirstChunk
from prophetkv_rag.model import ModelState, ModelSupport, TransformersRunner, own_state
from prophetkv_rag.prompt import PromptLayout, Tokens
from prophetkv_rag.store import CacheIdentity, ChunkCache, ChunkStore, TextEntry
from prophetkv_rag.text import well_formed


class ChunkLibrary(AddsChunks):
    """Everything an engine knows about chunks; see `ProphetKVEngine.add_chunks` for the contract."""

    def __init__(
        self,
        model: Any,
        support: ModelSupport,
        tokens: Tokens,
        store: ChunkStore,
        identity: CacheIdentity,
        prefix: EncodingPrefix | None,
        *,
        opening_length: int,
        encoding: Encoding,
        state: ModelState,
        context_window: int,
        batch_tokens: int,
        model_lock: AbstractContextManager[Any],
    ) -> None:
        """Open the library: texts that the store knows for this identity are found in prompts from now on."""
        self.model = model
        self.support = support
        self.prefix = prefix
        self.state = state
        self.context_window = context_window
        self.model_lock = model_lock
        if model.device.type == "cuda":
            store.pin_memory()
        self._encoder = ChunkEncoder(
            TransformersRunner(model),
            support,
            prefix,
            identity,
            encoding,
            store,
            state=state,
            context_window=support.context_window,
            batch_tokens=batch_tokens,
        )
        self._opening = replace(identity, prefix_ids=identity.prefix_ids[:opening_length], encoding="")
        self._loader = PromptLoader(store, self._encoder, self._opening)
        super().__init__(tokens, store, identity, encoding, ChunkWriter(store, identity.fingerprint, model_lock))
        name = well_formed(str(getattr(model.config, "_name_or_path", "") or model.config.model_type))
        self._name = Path(name).name
        if self.has_second:
            self._describe(self._name, self._opening)
        self._describe(self._name, identity)

    def _check_length(self, name: str, input_ids: Sequence[int]) -> None:
        check_length(name, input_ids, self.identity.prefix_ids, self.context_window)

    def _learn_text(self, key: str, input_ids: list[int], entry: TextEntry | None) -> bool:
        cache, _ = self.store.get(key, fingerprint=self.identity.fingerprint, input_ids=input_ids)
        return cache is not None and self._writer.put(key, cache, entry)

    def _compute(
        self, missing: Wanted, before: Mapping[str, Sequence[str]], progress: AddProgress, as_neighbours: bool
    ) -> set[str]:
        if before.keys().isdisjoint(missing):
            encode = self._encode_alone
        else:
            encode = partial(self._encoder.encode_behind, behind=before, is_chained=not as_neighbours)
            for key, chunk in missing.items():  # a cache is kept where all that it bears a trace of is known
                self._writer.note(key, *chunk)
        renewed = before.keys() if as_neighbours else ()
        failed, seconds_per_token = self._writer.write(missing, encode, progress, renewed)
        if seconds_per_token is not None:
            self._describe(self._name, self.identity, seconds_per_token)
        return failed

    def _encode_alone(self, chunks: Mapping[str, Sequence[int]]) -> Iterator[tuple[int, ChunkCache]]:
        return self._encoder.encode(list(chunks.values()))

    @own_state()
    def load(
        self,
        layout: PromptLayout,
        *,
        model_lock: AbstractContextManager[Any] | None = None,
        first_chunk: FirstChunk = "cached",
    ) -> LoadedChunks:
        """Load the chunks' caches, see `PromptLoader.load`; under `model_lock`, by default the library's own."""
        return self._loader.load(layout, model_lock or self.model_lock, first_chunk)

    @own_state()
    def add_second(self, texts: Iterable[str], *, progress: AddProgress = None) -> int:
        """See `AddsChunks.add_second`."""
        wanted: Wanted = {}
        for input_ids, _ in (self._chunk_ids(number, text) for number, text in enumerate(texts)):
            if (key := self._loader.missing_second(self.identity.key(input_ids), input_ids)) is not None:
                wanted[key] = (input_ids, None)
        writer = ChunkWriter(self.store, self._opening.fingerprint, self.model_lock)
        writer.write(wanted, self._loader.encode_second, progress)
        return len(wanted)

    @property
    def kv_widths(self) -> list[tuple[int, int, int]]:
        """See `AddsChunks.kv_widths`."""
        return [(one.num_key_value_heads, one.head_dim, one.value_head_dim) for one in self.support.layers]

    @property
    def has_second(self) -> bool:
        """See `AddsChunks.has_second`."""
        return self._opening != self.identity

    def read_ahead(self, rows: Iterable[Sequence[str]]) -> None:
        """Begin to load what prompts will want: see `PromptLoader.read_ahead`."""
        self._loader.read_ahead(rows)
