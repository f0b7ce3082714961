"""The chunks of `serve --engine vllm`: the store is read and written here, and vLLM's workers encode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prophetkv_rag.chunks import Placing
from prophetkv_rag.config import Encoding
from prophetkv_rag.errors import ContextWindowError, InputError, StoreError
from prophetkv_rag.prompt import ChunkIndex, Tokens, text_entry
from prophetkv_rag.store import CacheIdentity, ChunkStore
from prophetkv_rag.text import well_formed

_AT_ONCE = 16
"""Chunks that one request registers: between two of them a shutdown is noticed."""


class ServedChunks:
    """Adds and removes chunks, as `ProphetKVEngine` does.

    Args:
        store: Of this process.
        identity: Of the chunks.
        tokens: The model's tokenizer.
        chunk_index: Finds their texts in prompts.
        encoding: What they are encoded behind.
        most_tokens: Longest chunk.
        register: Sends our part of a request's `kv_transfer_params` to vLLM, and returns that of the answer.
    """

    def __init__(
        self,
        store: ChunkStore,
        identity: CacheIdentity,
        tokens: Tokens,
        chunk_index: ChunkIndex,
        encoding: Encoding,
        *,
        most_tokens: int,
        register: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        self._store = store
        self._identity = identity
        self._tokens = tokens
        self._chunk_index = chunk_index
        self._placing = Placing(encoding, store, self._tried, self.key_of)
        self._most_tokens = most_tokens
        self._register = register

    def key_of(self, text: str) -> str:
        """Return the key of the chunk with this text, whether or not it is known."""
        return self._identity.key(self._tokens.chunk(well_formed(text).strip()))

    def add(
        self,
        texts: Sequence[str],
        *,
        owner: str,
        behind: Sequence[Sequence[str]] | None,
        progress: Callable[[int, int], None] | None,
    ) -> list[str]:
        """Have what is missing encoded and stored; see `ProphetKVEngine.add_chunks`.

        Raises:
            InputError: If a chunk is empty, or `behind` is not as long as the texts.
            ContextWindowError: If a chunk is longer than one step of vLLM may be. Nothing is stored then.
            StoreError: If the store does not take them.
        """
        stripped = [well_formed(text).strip() for text in texts]
        if behind is not None and len(behind) != len(stripped):
            msg = f"behind has {len(behind)} entries for {len(stripped)} chunks; give one for each"
            raise InputError(msg)
        chunks = [self._ids(number, text) for number, text in enumerate(stripped)]
        keys = [self._identity.key(ids) for ids in chunks]
        placed = None if behind is None else [[well_formed(text).strip() for text in one] for one in behind]
        before = self._placing.before(stripped, keys, placed, as_neighbours=False)
        missing = {key: ids for key, ids in zip(keys, chunks, strict=True) if self._is_missing(key, before)}
        for done in range(0, len(missing), _AT_ONCE):
            if progress is not None:
                progress(done, len(missing))
            some = {key: missing[key] for key in list(missing)[done : done + _AT_ONCE]}
            self._encode(some, before)
        for key, ids, text in zip(keys, chunks, stripped, strict=True):
            entry = text_entry(text)
            if entry is not None:
                self._store.note(key, fingerprint=self._identity.fingerprint, num_tokens=len(ids), entry=entry)
                self._chunk_index.add(key, entry)
        self._store.add_references(owner, keys)
        return keys

    def remove(self, keys: Iterable[str], *, owner: str) -> list[str]:
        """See `ProphetKVEngine.remove_chunks`."""
        deleted = self._store.drop_references(owner, list(keys))
        for key in deleted:
            self._chunk_index.remove(key)
        return deleted

    def _ids(self, number: int, text: str) -> list[int]:
        ids = self._tokens.chunk(text) if text else []
        if not ids:
            msg = f"chunk {number} is empty; leave it out"
            raise InputError(msg)
        if len(ids) > self._most_tokens:
            msg = f"chunk {number} has {len(ids)} tokens, and a step of vLLM {self._most_tokens} at most; split it"
            raise ContextWindowError(msg)
        return ids

    def _is_missing(self, key: str, before: Mapping[str, Sequence[str]]) -> bool:
        if key not in self._store:
            return True
        return key in before and self._placing.is_wanted_anew(key, before[key], refresh=False)

    def _encode(self, chunks: Mapping[str, Sequence[int]], before: Mapping[str, Sequence[str]]) -> None:
        behind = [list(before.get(key, ())) for key in chunks]
        said = self._register({"register": [list(ids) for ids in chunks.values()], "behind": behind})
        if "error" in said:
            raise ContextWindowError(said["error"])
        errors = said.get("errors", {})
        if errors:
            msg = f"{len(errors)} chunks could not be encoded or stored: {next(iter(errors.values()))}"
            raise StoreError(msg)

    def _tried(self, call: Callable[..., Any], *arguments: Any, otherwise: Any) -> Any:
        try:
            return call(*arguments)
        except StoreError as error:
            self._store.failures.note(error)
            return otherwise
