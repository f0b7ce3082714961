"""The chunks of an engine on vLLM: texts and references are kept here, and vLLM's workers encode and store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from prophetkv_rag.chunks import AddProgress, AddsChunks, ChunkWriter, Wanted, in_order
from prophetkv_rag.config import Encoding
from prophetkv_rag.errors import ContextWindowError, InputError, StoreError
from prophetkv_rag.integrations.vllm.encoding import NOT_TAKEN
from prophetkv_rag.integrations.vllm.identity import opening_of
from prophetkv_rag.prompt import Tokens
from prophetkv_rag.store import CacheIdentity, ChunkStore, TextEntry

_AT_ONCE = 16
"""Chunks that one request registers: between two of them a shutdown is noticed, and whether there is room left."""

Register = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Sends our part of a request's `kv_transfer_params` to vLLM, and returns that of the answer."""


class ServedChunks(AddsChunks):
    """Adds and removes chunks, as the library of a `ProphetKVEngine` does.

    Args:
        name: What statistics call the model.
        tokens: The model's tokenizer.
        store: Of this process.
        identity: Of the chunks.
        encoding: What they are encoded behind.
        model_config: vLLM's.
        most_tokens: Longest chunk.
        register: Reaches the workers.
    """

    def __init__(
        self,
        name: str,
        tokens: Tokens,
        store: ChunkStore,
        identity: CacheIdentity,
        encoding: Encoding,
        model_config: Any,
        *,
        most_tokens: int,
        register: Register,
    ) -> None:
        super().__init__(tokens, store, identity, encoding, ChunkWriter(store, identity.fingerprint, nullcontext()))
        self._name = name
        self._model_config = model_config
        self._most_tokens = most_tokens
        self._register = register
        if self.has_second:
            self._describe(name, opening_of(identity))
        self._describe(name, identity)

    def _check_length(self, name: str, input_ids: Sequence[int]) -> None:
        if len(input_ids) > self._most_tokens:
            msg = f"{name} has {len(input_ids)} tokens, and a step of vLLM {self._most_tokens} at most; split it"
            raise ContextWindowError(msg)

    def _learn_text(self, key: str, input_ids: list[int], entry: TextEntry | None) -> bool:
        return self._writer.note(key, input_ids, entry)

    def _compute(
        self, missing: Wanted, before: Mapping[str, Sequence[str]], progress: AddProgress, as_neighbours: bool
    ) -> set[str]:
        for key, chunk in missing.items():  # the workers know no texts, and keep what bears traces of known chunks
            self._writer.note(key, *chunk)
        ordered = list(missing) if as_neighbours else in_order(missing, before)

        def placed(keys: Sequence[str]) -> Mapping[str, Any]:
            behind = [list(before.get(key, ())) for key in keys]
            return {"behind": behind, "as_neighbours": as_neighbours, "refresh": True}  # all of them are wanted anew

        failed, seconds_per_token = self._encode({key: missing[key][0] for key in ordered}, placed, progress)
        if seconds_per_token is not None:
            self._describe(self._name, self.identity, seconds_per_token)
        return failed

    def _encode(
        self,
        chunks: Mapping[str, list[int]],
        more: Callable[[Sequence[str]], Mapping[str, Any]],
        progress: AddProgress,
    ) -> tuple[set[str], float | None]:
        """Have the workers encode and store chunks, as far as there is room.

        Args:
            chunks: Key -> token ids.
            more: Returns what a request says of chunks with these keys.
            progress: Called once for each chunk that is done.

        Returns:
            The keys that the store failed to take, and the seconds that a token took, if any was computed.
        """
        failed: set[str] = set()
        left, started, tokens = list(chunks), time.perf_counter(), 0
        while left and self._writer.accepts_new():
            keys, left = left[:_AT_ONCE], left[_AT_ONCE:]
            said = self._register({"register": [chunks[key] for key in keys], **more(keys)})
            if "error" in said:
                raise InputError(said["error"])
            errors = {key: reason for key, reason in said.get("errors", {}).items() if reason != NOT_TAKEN}
            if errors:
                self.store.failures.note(StoreError(next(iter(errors.values()))), caches=len(errors))
            else:
                self.store.failures.end()
            failed.update(errors)
            tokens += sum(len(chunks[key]) for key in keys)
            done = len(chunks) - len(left)
            for number in range(done - len(keys), done):
                if progress is not None:
                    progress(number + 1, len(chunks))
        if left and self.store.failures.is_failing:
            self.store.failures.count(len(left))
            failed.update(left)
        return failed, (time.perf_counter() - started) / tokens if tokens else None

    @property
    def kv_widths(self) -> list[tuple[int, int, int]]:
        """See `AddsChunks.kv_widths`; all as the model's configuration says of most."""
        heads, width = self._model_config.get_total_num_kv_heads(), self._model_config.get_head_size()
        return [(heads, width, width)] * self._model_config.hf_text_config.num_hidden_layers

    @property
    def has_second(self) -> bool:
        """See `AddsChunks.has_second`."""
        return bool(self.identity.encoding)

    def add_second(self, texts: Iterable[str], *, progress: AddProgress = None) -> int:
        """See `AddsChunks.add_second`."""
        chunks: dict[str, list[int]] = {}
        for number, text in enumerate(texts):
            input_ids, _ = self._chunk_ids(number, text)
            own = opening_of(self.identity).key(input_ids)
            if own not in self.store and self.store.behind(self.identity.key(input_ids)).keys:
                chunks[own] = input_ids
        self._encode(chunks, lambda keys: {"first_chunks": True}, progress)
        return len(chunks)

    def read_ahead(self, rows: Iterable[Sequence[str]]) -> None:
        """Do nothing: the workers do that when a request comes."""
