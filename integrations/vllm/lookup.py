"""The scheduler's view of the stored chunks: which are in a prompt, what each was encoded behind, what is missing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from prophetkv_rag.config import FirstChunk
from prophetkv_rag.errors import StoreError
from prophetkv_rag.integrations.vllm.identity import opening_of
from prophetkv_rag.integrations.vllm.messages import EncodeJob
from prophetkv_rag.integrations.vllm.plans import follows_opening
from prophetkv_rag.prompt import TokenIndex, TokenMatch
from prophetkv_rag.store import CacheIdentity
from prophetkv_rag.store.disk import DiskStore

logger = logging.getLogger(__name__)

_LOOKED_AT = 64
"""Lost caches that are looked for again with each prompt; more of them take turns."""


@dataclass(slots=True)
class Found:
    """Chunks of a prompt whose caches are there, or can be had.

    Attributes:
        matches: In order.
        behind: For each, the keys of the chunks that its cache is encoded behind.
        first_key: Key of the first one's second cache; "" if it is taken from its own.
        versions: What tells apart the caches that a key had one after the other.
        missing: Key -> cache that must be computed first.
    """

    matches: tuple[TokenMatch, ...]
    behind: tuple[tuple[str, ...], ...]
    first_key: str = ""
    versions: tuple[int, ...] = ()
    missing: dict[str, EncodeJob] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Of the caches that the prompt is filled from."""
        first = self.first_key or self.matches[0].key
        return [first, *(match.key for match in self.matches[1:])]


class ChunkLookup:
    """Finds chunks in prompts by their token ids; for one thread.

    Args:
        store: Of this process.
        identity: Of the chunks.
    """

    def __init__(self, store: DiskStore, identity: CacheIdentity) -> None:
        self._store = store
        self._identity = identity
        self._opening = opening_of(identity)
        self._index = TokenIndex()
        self._lost: dict[str, tuple[tuple[int, ...], int]] = {}
        self._hopeless: set[str] = set()

    def refresh(self) -> None:
        """Learn the chunks that were stored since, by whatever process."""
        self._store.forget_deleted()
        try:
            for key, ids in self._store.new_chunks(self._identity.fingerprint):
                self._index.add(key, ids)
            for key in list(self._lost)[:_LOOKED_AT]:
                lost, version = self._lost.pop(key)
                if not version or self.version(key) != version:
                    self._index.add(key, lost)
                elif key in self._store.known([key]):
                    self._lost[key] = lost, version  # the same bad file is there: the last in turn now
        except StoreError as error:
            logger.warning("chunks that other processes store are not found: %s", error)

    def add(self, key: str, ids: Sequence[int]) -> None:
        """Know a chunk that is stored now."""
        self._index.add(key, ids)
        self._hopeless.discard(key)
        self._lost.pop(key, None)

    def lose(self, key: str) -> None:
        """Leave a chunk out whose cache is missing or bad, until there is another one."""
        if key in self._index:
            self._lost[key] = tuple(self._index.ids(key)), self.version(key)
            self._index.remove(key)

    def give_up(self, key: str) -> None:
        """Compute a cache no more for prompts: it could not be stored."""
        self._hopeless.add(key)

    def find(self, prompt: Sequence[int], first_chunk: FirstChunk) -> Found | None:
        """Find a prompt's chunks; `None` if there are none.

        Args:
            prompt: Its token ids.
            first_chunk: `"opening"` has the first one from its second cache, unless its own was encoded so; `"exact"`
                does so where that is exact, since else its rows are computed anyway.
        """
        self.refresh()
        try:
            return self._find(tuple(prompt), first_chunk)
        except StoreError as error:
            logger.warning("the store does not answer: %s", error)
            return None

    def _find(self, prompt: tuple[int, ...], first_chunk: FirstChunk) -> Found | None:
        matches, missing = [], dict[str, EncodeJob]()
        for match in self._index.find(prompt):
            if match.key not in self._store:
                if match.key not in self._store.known([match.key]):
                    self._index.remove(match.key)  # deleted
                    continue
                if match.key in self._hopeless:
                    continue
                missing[match.key] = self._again(match.key)
            matches.append(match)
        if not matches:
            return None
        behind = tuple(missing[m.key].behind if m.key in missing else self._behind(m.key) for m in matches)
        found = Found(tuple(matches), behind, missing=missing)
        is_first = follows_opening(prompt, matches[0], self._opening.prefix_ids)
        if behind[0] and (first_chunk == "opening" or (first_chunk == "exact" and is_first)):
            self._take_second(found)
        found.versions = tuple(map(self.version, found.keys))
        return found

    def _take_second(self, found: Found) -> None:
        own = found.matches[0].key
        ids = tuple(self._index.ids(own))
        key = self._opening.key(ids)
        if key not in self._store:
            if key in self._hopeless:
                return
            found.missing[key] = EncodeJob(ids, kept_with=own)
        found.first_key = key
        if own not in {match.key for match in found.matches[1:]}:
            found.missing.pop(own, None)
        found.behind = ((), *found.behind[1:])

    def _again(self, key: str) -> EncodeJob:
        """Return how a known chunk is encoded again: as it was, or alone where what it stood behind is gone."""
        ids, behind = tuple(self._index.ids(key)), self._behind(key)
        if not behind or any(one not in self._store for one in behind):
            return EncodeJob(ids)
        return EncodeJob(ids, behind, is_chained=self._store.behind(key).is_chained)

    def _behind(self, key: str) -> tuple[str, ...]:
        return self._store.behind(key).keys if self._identity.encoding else ()

    def nbytes(self, key: str) -> int:
        """Return the bytes of a key's cache on disk, which are a little more than in RAM; 0 if it has none."""
        try:
            return self._store.files.path(key).stat().st_size
        except OSError:
            return 0

    def version(self, key: str) -> int:
        """Return what tells apart the caches that a key had one after the other; 0 if it has none."""
        try:
            return self._store.files.path(key).stat().st_mtime_ns
        except OSError:
            return 0
