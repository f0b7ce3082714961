"""Runs the model for chunks of one identity: behind the prefix alone, or behind other chunks as the encoding says.

The chunks before a chunk come as caches. For `previous` they are as they are stored, each encoded behind those before
it, so one run of every chunk is enough, and a document encoded so behind all of its chunks has exactly the keys and
values of its own full prefill; such chunks are called chained. For `neighbours` each is encoded for itself alone, so a
chunk bears the trace of its neighbours only, and not of theirs.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prophetkv_rag.chunks.encode import EncodingPrefix, Job, check_dtype, encode_behind, encode_chunks
from prophetkv_rag.chunks.order import waves
from prophetkv_rag.chunks.recent import RecentCaches
from prophetkv_rag.config import Encoding
from prophetkv_rag.errors import StoreError
from prophetkv_rag.model import ModelState, ModelSupport, Runner
from prophetkv_rag.store import Behind, CacheIdentity, ChunkCache, Lookup

logger = logging.getLogger(__name__)

ALONE_BYTES = 1 << 30
"""K/V bytes of neighbours, encoded alone, that are held for the next chunks that stand behind them."""


class CacheSource(Protocol):
    """What is needed of a `ChunkStore`."""

    def find(self, key: str, *, fingerprint: str, input_ids: Sequence[int] | None) -> Lookup:
        """See `ChunkStore`."""

    def known(self, keys: Iterable[str]) -> set[str]:
        """See `ChunkStore`."""

    def behind(self, key: str) -> Behind:
        """See `ChunkStore`."""


class ChunkEncoder:
    """Encodes chunks; the caller holds the model's lock while it takes the next ones.

    Args:
        runner: Runs the language model.
        support: The probe's findings.
        prefix: What every chunk is encoded behind.
        identity: Of the caches.
        encoding: Which other chunks they are encoded behind.
        store: Has the caches of those.
        state: What the model must still be; `None` where nobody can change it.
        context_window: The model's own, in tokens.
        batch_tokens: Upper bound of tokens in a batch, padding included.
    """

    def __init__(
        self,
        runner: Runner,
        support: ModelSupport,
        prefix: EncodingPrefix | None,
        identity: CacheIdentity,
        encoding: Encoding,
        store: CacheSource,
        *,
        state: ModelState | None,
        context_window: int,
        batch_tokens: int,
    ) -> None:
        self.runner = runner
        self.support = support
        self.prefix = prefix
        self.identity = identity
        self.encoding = encoding
        self.store = store
        self.state = state
        self.context_window = context_window
        self.batch_tokens = batch_tokens
        self._has_told = False

    def behind_prefix(self, prefix: EncodingPrefix | None, identity: CacheIdentity, encoding: Encoding) -> ChunkEncoder:
        """Return an encoder of another identity on the same model and store."""
        other = copy.copy(self)
        other.prefix, other.identity, other.encoding = prefix, identity, encoding
        return other

    def encode(self, chunks: Sequence[Sequence[int]]) -> Iterator[tuple[int, ChunkCache]]:
        """Encode chunks alone behind the prefix; see `encode_chunks`."""
        encoding = encode_chunks(self.runner, self.support, self.prefix, chunks, batch_tokens=self.batch_tokens)
        while True:
            self._check_state()
            item = next(encoding, None)
            if item is None:
                return
            check_dtype(item[1], self.identity)
            yield item

    def encode_behind(
        self, chunks: Mapping[str, Sequence[int]], behind: Mapping[str, Sequence[str]], *, is_chained: bool
    ) -> Iterator[tuple[int, ChunkCache]]:
        """Encode chunks behind others.

        Args:
            chunks: Key -> token ids of the chunks to encode.
            behind: Key -> keys of the chunks before it, the last one right before it. Those that are neither among
                `chunks` nor in the store are left out, and the farthest where the context window is too short.
            is_chained: Whether those come as they are stored, or each encoded for itself alone.

        Yields:
            (index into `chunks`, its cache), as `encode_chunks`.
        """
        numbers = {key: number for number, key in enumerate(chunks)}
        before = RecentCaches(ALONE_BYTES)
        lengths = {key: len(ids) for key, ids in chunks.items()}
        needed_later = before.expect(behind.get(key, ()) for key in chunks)
        for wave in waves(lengths, behind, batch_tokens=self.batch_tokens, is_chained=is_chained):
            self._make_ready(wave, chunks, behind, before, is_chained=is_chained)
            jobs = [self._job(chunks[key], behind.get(key, ()), before, is_chained=is_chained) for key in wave]
            self._check_state()
            for key, cache in zip(wave, encode_behind(self.runner, self.support, self.prefix, jobs), strict=True):
                check_dtype(cache, self.identity)
                needed_later.used(behind.get(key, ()))
                if is_chained and needed_later.is_wanted(key):
                    before.put(key, cache)
                yield numbers[key], cache
            if not is_chained:  # of those, no more are held than the next chunks need; lost, they would be left out
                before.trim()

    def encode_again(self, key: str, input_ids: Sequence[int]) -> ChunkCache | None:
        """Encode a chunk as it was encoded before, or return `None` where what it stood behind cannot be had.

        For a prompt: of a chunk that is chained to others nothing but itself is computed.
        """
        if self.encoding.kind == "plain":
            return None
        try:
            behind = self.store.behind(key)
        except StoreError as error:
            logger.debug("what the chunk %s was encoded behind cannot be told: %s", key, error)
            return None
        if not behind.keys:
            return None
        before = RecentCaches(ALONE_BYTES)
        for one in behind.keys:
            cache = self._stored(one)
            if cache is None:
                return None
            before.put(one, cache if behind.is_chained or not cache.behind.keys else self._alone(cache))
        job = self._job(input_ids, behind.keys, before, is_chained=behind.is_chained)
        self._check_state()
        (cache,) = encode_behind(self.runner, self.support, self.prefix, [job])
        check_dtype(cache, self.identity)
        return cache

    def _check_state(self) -> None:
        if self.state is not None:
            self.state.check()

    def _make_ready(
        self,
        wave: Sequence[str],
        chunks: Mapping[str, Sequence[int]],
        behind: Mapping[str, Sequence[str]],
        before: RecentCaches,
        *,
        is_chained: bool,
    ) -> None:
        """Have the caches of all that this wave stands behind."""
        missing = dict.fromkeys(one for key in wave for one in behind.get(key, ()) if one not in before)
        to_encode: dict[str, Sequence[int]] = {}
        for one in missing:
            cache = self._stored(one)
            if cache is not None and (is_chained or not cache.behind.keys):
                before.put(one, cache)
            elif not is_chained and (cache is not None or one in chunks):
                to_encode[one] = chunks[one] if one in chunks else cache.input_ids.tolist()  # type: ignore[union-attr]
        keys = list(to_encode)
        for index, cache in self.encode([to_encode[one] for one in keys]):
            before.put(keys[index], cache)

    def _stored(self, key: str) -> ChunkCache | None:
        try:
            cache = self.store.find(key, fingerprint=self.identity.fingerprint, input_ids=None).cache
            traces = () if cache is None else cache.behind.traces
            return cache if len(self.store.known(traces)) == len(set(traces)) else None
        except StoreError as error:
            logger.debug("a chunk is encoded without the chunk %s before it: %s", key, error)
            return None

    def _alone(self, cache: ChunkCache) -> ChunkCache:
        ((_, alone),) = self.encode([cache.input_ids.tolist()])
        return alone

    def _job(self, input_ids: Sequence[int], keys: Sequence[str], before: RecentCaches, *, is_chained: bool) -> Job:
        caches = {key: cache for key in keys if (cache := before.get(key)) is not None}
        room = self.context_window - len(input_ids) - len(self.identity.prefix_ids)
        while caches and sum(cache.num_tokens for cache in caches.values()) > room:
            del caches[next(iter(caches))]
            self._tell_of_window()
        through: dict[str, None] = {}
        if is_chained:
            through = dict.fromkeys(key for cache in caches.values() for key in cache.behind.traces)
        behind = Behind(tuple(caches), tuple(key for key in through if key not in caches), is_chained)
        return Job(input_ids, tuple(caches.values()), behind)

    def _tell_of_window(self) -> None:
        if not self._has_told:
            logger.warning(
                "the context window of %d tokens is too short for a chunk and all %d chunks before it (encoding %s): "
                "the farthest are left out",
                self.context_window,
                self.encoding.count,
                self.encoding,
            )
        self._has_told = True
