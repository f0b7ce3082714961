"""Indexing's way into the store: compute, write while the next are computed, and go on where the store fails."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

from prophetkv_rag.errors import StoreError
from prophetkv_rag.store import ChunkCache, ChunkStore, TextEntry

MAX_PENDING_WRITES = 16
"""Computed caches that may wait for the disk; bounds memory when it is slower than the model."""

Wanted = dict[str, tuple[list[int], TextEntry | None]]
"""Key -> token ids, and how the text is recognised."""
Encode = Callable[[Mapping[str, Sequence[int]]], Iterator[tuple[int, ChunkCache]]]
"""Key -> token ids of chunks; to (index, cache), batch by batch; each step runs under the model's lock."""
T = TypeVar("T")


class ChunkWriter:
    """Writes the chunks of one identity into a store. No method raises what the store raises: that is noted.

    Args:
        store: Where to; its `failures` are told what it could not take.
        fingerprint: Of the identity.
        model_lock: Held while the model runs.
    """

    def __init__(self, store: ChunkStore, fingerprint: str, model_lock: AbstractContextManager[Any]) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._model_lock = model_lock
        self._unsaved: dict[str, dict[str, None]] = {}
        """Owner -> keys whose references the store could not take."""

    def tried(self, call: Callable[..., T], *arguments: Any, otherwise: T) -> T:
        """Call the store, or note that it fails and return `otherwise`."""
        try:
            return call(*arguments)
        except (StoreError, OSError) as error:
            self._store.failures.note(error)
            return otherwise

    def write(
        self,
        missing: Wanted,
        encode: Encode,
        progress: Callable[[int, int], None] | None,
        renewed: Collection[str] = (),
    ) -> tuple[set[str], float | None]:
        """Compute and store chunks; what the store has no room for, or does not want yet, it only gets to know.

        What a slower tier has is not computed, but for `renewed` chunks that are stored: it has those as they are, too.

        Returns:
            Keys that it failed to take, and the seconds that a token took, if any was computed.
        """
        elsewhere = {key: chunk for key, chunk in missing.items() if key not in renewed or key not in self._store}
        here = self._store.bring(elsewhere, fingerprint=self._fingerprint) if elsewhere else set()
        left = {key: chunk for key, chunk in missing.items() if key not in here}
        seconds_per_token: float | None = None
        if left and self.accepts_new():
            seconds_per_token = self._encode_and_store(dict(left), left, encode, progress)
        failed = set(left) if self._store.failures.is_failing and self._store.policy == "eager" else set()
        self._store.failures.count(len(failed))
        for key, chunk in left.items():
            if not self.note(key, *chunk):
                failed.add(key)
        return failed, seconds_per_token

    def note(self, key: str, input_ids: list[int], entry: TextEntry | None) -> bool:
        """Let the store know a chunk without a cache; returns whether that succeeded."""
        return self.tried(self._note, key, input_ids, entry, otherwise=False)

    def put(self, key: str, cache: ChunkCache, entry: TextEntry | None) -> bool:
        """Store a cache; returns whether that succeeded."""
        return self.tried(self._put, key, cache, entry, otherwise=False)

    def refer(self, owner: str, keys: Iterable[str]) -> None:
        """Refer to these keys, and to those of the owner that the store could not take earlier."""
        wanted = self._unsaved.get(owner, {}) | dict.fromkeys(keys)
        is_saved = self.tried(self._refer, owner, wanted, otherwise=False)
        if not is_saved:
            self._unsaved[owner] = wanted

    def refer_now(self, owner: str, key: str) -> bool:
        """Refer to a key, or note that the store fails; returns whether it is referred to. Nothing is tried later."""
        return self.tried(self._add_reference, owner, key, otherwise=False)

    def release(self, owner: str, keys: Sequence[str]) -> list[str]:
        """Drop `owner`'s references; returns what nobody refers to any more and is deleted.

        Raises:
            StoreError, OSError: If the store cannot be written. What is said to be deleted is deleted.
        """
        unsaved = self._unsaved.get(owner, {})
        if not unsaved.keys().isdisjoint(keys):  # the store could not give back what it never heard of
            self._refer(owner, unsaved)
        return self._store.drop_references(owner, keys)

    def accepts_new(self, waiting: int = 0) -> bool:
        """See `ChunkStore.accepts_new`; a store that fails does not."""
        accepts_new = partial(self._store.accepts_new, fingerprint=self._fingerprint)
        return self.tried(accepts_new, waiting, otherwise=False)

    def _add_reference(self, owner: str, key: str) -> bool:
        self._store.add_references(owner, [key])
        return True

    def _refer(self, owner: str, keys: Iterable[str]) -> bool:
        self._store.add_references(owner, keys)
        self._unsaved.pop(owner, None)
        return True

    def _note(self, key: str, input_ids: list[int], entry: TextEntry | None) -> bool:
        self._store.note(key, fingerprint=self._fingerprint, num_tokens=len(input_ids), entry=entry)
        return True

    def _put(self, key: str, cache: ChunkCache, entry: TextEntry | None) -> bool:
        self._store.put(key, cache, fingerprint=self._fingerprint, entry=entry)
        self._store.failures.end()
        return True

    def _encode_and_store(
        self, missing: Wanted, left: Wanted, encode: Encode, progress: Callable[[int, int], None] | None
    ) -> float | None:
        """Take from `left` what was computed and stored, until all is or the store takes no more."""
        keys = list(missing)
        seconds, tokens, computed = 0.0, 0, 0
        encoding = encode({key: input_ids for key, (input_ids, _) in missing.items()})
        # Writing a blob waits for the disk; a second thread does that while the model computes the next batch.
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prophetkv-store") as writer:
            writes: deque[tuple[str, Future[bool]]] = deque()
            while True:
                is_wanted = self.accepts_new(len(writes))
                with self._model_lock:  # released between batches, so that queries are answered while indexing
                    started = time.perf_counter()
                    item = next(encoding, None) if is_wanted else None
                    seconds += time.perf_counter() - started
                while writes and (item is None or len(writes) >= MAX_PENDING_WRITES):
                    key, write = writes.popleft()
                    if write.result():
                        del left[key]
                if item is None:
                    break
                index, cache = item
                key = keys[index]
                writes.append((key, writer.submit(self.put, key, cache, missing[key][1])))
                tokens += cache.num_tokens
                computed += 1
                if progress is not None:
                    progress(computed, len(keys))
        return seconds / tokens if tokens else None
