"""Chunks that are added and removed: their texts, who refers to them, and what is missing; others encode that."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

from prophetkv_rag.chunks.placing import Placing
from prophetkv_rag.chunks.writer import ChunkWriter, Wanted
from prophetkv_rag.config import Encoding
from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.model import own_state
from prophetkv_rag.prompt import ChunkIndex, Tokens, text_entry
from prophetkv_rag.store import CacheIdentity, ChunkStore, TextEntry
from prophetkv_rag.text import well_formed

logger = logging.getLogger(__name__)

AddProgress = Callable[[int, int], None] | None
"""Called with (chunks computed so far, chunks to compute)."""


class AddsChunks(ABC):
    """The chunks of one identity that an engine knows; see `ProphetKVEngine.add_chunks` for the contract.

    Args:
        tokens: The model's tokenizer.
        store: Where caches are kept. Texts that it knows for this identity are found in prompts from now on.
        identity: Of the caches.
        encoding: Which other chunks they are encoded behind.
        writer: Of that store and identity.
    """

    def __init__(
        self, tokens: Tokens, store: ChunkStore, identity: CacheIdentity, encoding: Encoding, writer: ChunkWriter
    ) -> None:
        self.tokens = tokens
        self.store = store
        self.identity = identity
        self.encoding = encoding
        self.chunk_index = ChunkIndex()
        self._begin_anew()
        around_fork(self, in_child=AddsChunks._begin_anew)
        self._has_warned = False
        self._registered: set[str] = set()  # keys whose text the index knows and the store does not
        self._writer = writer
        self._placing = Placing(encoding, store, writer.tried, self.key_of)
        self.chunk_index.load(store.entry_columns(identity.fingerprint))

    def _begin_anew(self) -> None:
        # References and the index change together. A fork does not wait for it, as whoever has it may wait for other
        # processes; what was being added in the parent, a child learns as it learns what any process adds.
        self._owners_lock = threading.Lock()

    @abstractmethod
    def _check_length(self, name: str, input_ids: Sequence[int]) -> None:
        """Raise `ContextWindowError`, which says `name`, for a chunk that is too long to be encoded."""

    @abstractmethod
    def _learn_text(self, key: str, input_ids: list[int], entry: TextEntry | None) -> bool:
        """Record the text of a chunk that was stored by its token ids alone; returns whether its cache is good."""

    @abstractmethod
    def _compute(
        self, missing: Wanted, before: Mapping[str, Sequence[str]], progress: AddProgress, as_neighbours: bool
    ) -> set[str]:
        """Compute and store what is missing.

        Args:
            missing: The chunks; one that is stored is encoded anew.
            before: Key -> keys of the chunks that it is encoded behind.
            progress: Called once for each chunk that is done.
            as_neighbours: Whether those are its neighbours, each encoded for itself alone.

        Returns:
            The keys that the store failed to take.
        """

    @property
    @abstractmethod
    def kv_widths(self) -> list[tuple[int, int, int]]:
        """For each layer: heads, width of a head's key and of its value."""

    @property
    @abstractmethod
    def has_second(self) -> bool:
        """Whether chunks may have a second cache, which they are read from where a prompt begins with them."""

    @abstractmethod
    def add_second(self, texts: Iterable[str], *, progress: AddProgress = None) -> int:
        """Store the second caches of known chunks; returns how many were missing.

        Without this one is computed when a prompt first begins with its chunk.
        """

    @abstractmethod
    def read_ahead(self, rows: Iterable[Sequence[str]]) -> None:
        """Begin to load what prompts will want.

        Args:
            rows: Keys of the chunks that each retrieval found, best first.
        """

    def _describe(self, model: str, identity: CacheIdentity, seconds_per_token: float | None = None) -> None:
        """Note for statistics what caches are of."""
        try:
            self.store.describe(
                identity.fingerprint,
                model=f"{model} {identity.model[:8]}",
                namespace=identity.namespace,
                seconds_per_token=seconds_per_token,
            )
        except StoreError as error:
            logger.debug("what the caches are of could not be noted: %s", error)

    @own_state()
    def refresh(self) -> None:
        """Learn the texts that other processes have stored since; a store that fails is logged once.

        Where somebody of this process is just adding or deleting, who may be waiting for another one, the next prompt
        learns them: no query waits for a write.
        """
        self.store.forget_deleted()
        if not self._owners_lock.acquire(blocking=False):
            return
        try:
            for key, entry in self.store.new_entries(self.identity.fingerprint):
                self.chunk_index.add(key, entry)
        except StoreError as error:
            if not self._has_warned:
                logger.warning("chunks that other processes add are not found in prompts: %s", error)
            self._has_warned = True
        finally:
            self._owners_lock.release()

    @own_state()
    def add(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        owner: str,
        behind: Sequence[Sequence[str]] | None = None,
        refresh: bool = False,
        as_neighbours: bool = False,
        progress: AddProgress = None,
    ) -> list[str]:
        """Compute and store what is missing, refer to all of it, and find it in prompts from now on.

        Where the store fails that is noted (`ChunkStore.failures`), and this process alone knows the chunks.
        `as_neighbours` says that `behind` holds nearest neighbours: chunks behind others of their document stay so.
        """
        if isinstance(texts, str):
            msg = "add_chunks got one string; give a list of chunks"
            raise InputError(msg)
        if behind is not None and len(behind) != len(texts):
            msg = (
                f"behind has {len(behind)} entries for {len(texts)} chunks; give one for each, empty where none stands"
            )
            raise InputError(msg)
        keys, wanted, missing = [], Wanted(), Wanted()
        for number, chunk in enumerate(texts):
            input_ids, entry = self._chunk_ids(number, chunk)
            key = self.identity.key(input_ids)
            keys.append(key)
            if key in wanted and entry is None:
                continue
            wanted[key] = (input_ids, entry)
            is_unknown_text = entry is not None and (key not in self.chunk_index or key in self._registered)
            is_stored = self._writer.tried(self.store.__contains__, key, otherwise=False)
            if not is_stored or (is_unknown_text and not self._learn_text(key, input_ids, entry)):
                missing[key] = (input_ids, entry)
        as_neighbours = as_neighbours or self.encoding.kind == "neighbours"
        before = self._placing.before(texts, keys, behind, as_neighbours=as_neighbours)
        if behind is not None:
            missing.update(
                {key: wanted[key] for key in before if self._placing.is_wanted_anew(key, before[key], refresh)}
            )
        failed = self._compute(missing, before, progress, as_neighbours)
        with self._owners_lock:
            self._writer.refer(owner, wanted)
            for key, (_, entry) in wanted.items():
                if entry is not None:
                    self.chunk_index.add(key, entry)
                    self._registered.discard(key)
        # Another owner may have dropped a cache between the look above and our reference, which holds it from now on.
        known = {key for key in wanted if key in failed or self._writer.tried(self.store.knows, key, otherwise=True)}
        self._compute({key: chunk for key, chunk in wanted.items() if key not in known}, before, None, as_neighbours)
        return keys

    @own_state()
    def register(self, text: str, *, owner: str) -> str | None:
        """Find a text in prompts from now on; its cache is computed, and stored, by the first prompt that holds it.

        Unlike `add` this runs no model, and only this process learns the text. `remove` undoes it.

        Returns:
            The chunk's key; `None` for a text too short to be found, where the store fails (that is noted once), and
            for one that is known already: whoever added that one says how long it lives.

        Raises:
            ContextWindowError: If the text is longer than the model's context window.
        """
        text = well_formed(text)
        entry = text_entry(text)
        if entry is None:
            return None
        input_ids = self.tokens.chunk(text.strip())
        self._check_length("the text", input_ids)
        key = self.identity.key(input_ids)
        with self._owners_lock:
            if key in self.chunk_index or not self._writer.refer_now(owner, key):
                return None
            self._registered.add(key)
            self.chunk_index.add(key, entry)
        return key

    @own_state()
    def remove(self, keys: Iterable[str], *, owner: str) -> list[str]:
        """Drop `owner`'s references; what nobody refers to any more is deleted and returned."""
        with self._owners_lock:
            deleted = self._writer.release(owner, list(keys))
            for key in deleted:
                self.chunk_index.remove(key)
                self._registered.discard(key)
        return deleted

    def _chunk_ids(self, number: int, chunk: str | Sequence[int]) -> tuple[list[int], TextEntry | None]:
        entry = None
        if isinstance(chunk, str):
            text = well_formed(chunk).strip()
            input_ids = self.tokens.chunk(text) if text else []
            entry = text_entry(text) if text else None
        else:
            input_ids = [int(token) for token in chunk]
        if not input_ids:
            msg = f"chunk {number} is empty; leave it out"
            raise InputError(msg)
        self._check_length(f"chunk {number}", input_ids)
        return input_ids, entry

    def without_order(self, texts: Sequence[str]) -> list[str]:
        """Return those that stand neither before nor behind others of their document, as far as that was asked for."""
        keys = [self.key_of(text) for text in texts]
        in_order = self._placing.in_order(keys)
        return [text for text, key in zip(texts, keys, strict=True) if key not in in_order]

    def key_of(self, text: str) -> str:
        """Return the key of the chunk with this text, whether or not it is known."""
        return self.identity.key(self.tokens.chunk(well_formed(text).strip()))
