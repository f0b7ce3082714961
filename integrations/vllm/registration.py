"""Caches to compute: new chunks that requests bring, and what prompts find missing; some tokens a step at most."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prophetkv_rag.chunks import Placing, in_order
from prophetkv_rag.config import Encoding
from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.integrations.vllm.identity import opening_of
from prophetkv_rag.integrations.vllm.messages import EncodeJob, StepReport
from prophetkv_rag.integrations.vllm.settings import RequestOptions
from prophetkv_rag.store import CacheIdentity, ChunkStore

logger = logging.getLogger(__name__)


@dataclass
class _Batch:
    """What one request waits for: the keys it brought in order, what is not stored yet, and what went wrong.

    Attributes:
        is_prompt: Whether it is a prompt that found something missing, and brought nothing.
    """

    keys: list[str]
    missing: dict[str, EncodeJob]
    is_prompt: bool = False
    errors: dict[str, str] = field(default_factory=dict)


class Registrations:
    """The caches that requests wait for.

    Args:
        store: Of this process.
        identity: Of the chunks.
        encoding: What they are encoded behind.
        max_tokens: Encode at most so many a step (one chunk is always allowed).
    """

    def __init__(self, store: ChunkStore, identity: CacheIdentity, encoding: Encoding, *, max_tokens: int) -> None:
        self._store = store
        self._identity = identity
        self._encoding = encoding
        self._placing = Placing(encoding, store, _asked, lambda key: key)
        self._max_tokens = max_tokens
        self._batches: dict[str, _Batch] = {}
        self._running: dict[str, EncodeJob] = {}
        self.reserved = 0
        """Tokens of a chunk that had to wait because a step was full: the next step keeps room for it."""

    def begin(self, request_id: str, options: RequestOptions, *, most: int) -> None:
        """Take a request's chunks.

        Raises:
            InputError: If one is empty, or longer than one forward may be.
        """
        most -= len(self._identity.prefix_ids)
        for number, chunk in enumerate(options.register):
            if not 0 < len(chunk) <= most:
                msg = f"chunk {number} has {len(chunk)} tokens; it must have 1 to {most}, so split it"
                raise InputError(msg)
        keys = [self._identity.key(chunk) for chunk in options.register]
        batch = self._batches[request_id] = _Batch(keys, {})
        try:
            batch.missing = self._second(keys, options) if options.first_chunks else self._wanted(keys, options)
        except StoreError as error:
            batch.errors = dict.fromkeys(keys, str(error))

    def await_caches(self, request_id: str, missing: Mapping[str, EncodeJob]) -> None:
        """Have a prompt wait for what it found missing."""
        self._batches[request_id] = _Batch([], dict(missing), is_prompt=True)

    def _wanted(self, keys: list[str], options: RequestOptions) -> dict[str, EncodeJob]:
        """Return what is missing of a request's chunks; what stands behind others comes after them."""
        has_order = self._encoding.kind == "previous"
        as_neighbours, behind = options.as_neighbours or not has_order, options.behind
        if options.in_order and not behind and has_order:
            count = self._encoding.count
            behind = tuple(tuple(keys[max(0, number - count) : number]) for number in range(len(keys)))
        before: Mapping[str, tuple[str, ...]] = {}
        if behind:
            before = self._placing.before(options.register, keys, behind, as_neighbours=as_neighbours)
        chunks = dict(zip(keys, options.register, strict=True))
        return {
            key: EncodeJob(chunks[key], before.get(key, ()), is_chained=not as_neighbours or key not in before)
            for key in (chunks if as_neighbours else in_order(chunks, before))
            if key not in self._store
            or (key in before and self._placing.is_wanted_anew(key, before[key], options.refresh))
        }

    def _second(self, keys: list[str], options: RequestOptions) -> dict[str, EncodeJob]:
        """Return the second caches that a request's chunks lack: of those that are stored behind others."""
        found = {}
        for key, chunk in zip(keys, options.register, strict=True):
            own = opening_of(self._identity).key(chunk)
            if own not in self._store and self._store.behind(key).keys:
                found[own] = EncodeJob(chunk, kept_with=key)
        return found

    def is_waiting(self, request_id: str) -> bool:
        """Whether not all of what a request waits for is stored yet."""
        batch = self._batches.get(request_id)
        return batch is not None and bool(batch.missing)

    def errors(self, request_id: str) -> dict[str, str]:
        """Return what could not be had of what a request waited for."""
        batch = self._batches.get(request_id)
        return {} if batch is None else batch.errors

    def next_jobs(self, room: int) -> dict[str, EncodeJob]:
        """Return what to encode in this step, which has room for so many tokens: prompts first, then by turns."""
        chosen: dict[str, EncodeJob] = {}
        self.reserved = 0
        left = min(room, self._max_tokens)
        for request_id, batch in sorted(self._batches.items(), key=lambda item: not item[1].is_prompt):
            is_full = False
            for key, job in batch.missing.items():
                if key in self._running or key in chosen:
                    continue
                if any(one in self._running for one in job.behind):
                    break
                is_full = left < job.num_tokens and bool(chosen or self._running or room < self._max_tokens)
                if is_full:
                    self.reserved = 0 if chosen else min(job.num_tokens, self._max_tokens)
                    break
                chosen[key] = job
                left -= job.num_tokens
            if not chosen.keys().isdisjoint(batch.missing):
                self._batches[request_id] = self._batches.pop(request_id)  # others are first in the next step
            if is_full:
                break
        self._running.update(chosen)
        return chosen

    def learn(self, report: StepReport) -> dict[str, EncodeJob]:
        """Take in what was encoded; returns that."""
        done = {key: self._running.pop(key) for key in report.encoded if key in self._running}
        failed = {key: reason for key, reason in report.not_encoded.items() if self._running.pop(key, None)}
        for batch in self._batches.values():
            for key in [key for key in batch.missing if key in done or key in failed]:
                del batch.missing[key]
                if key in failed:
                    batch.errors[key] = failed[key]
        return done

    def finish(self, request_id: str) -> dict[str, Any] | None:
        """Return what a request's answer says, and forget it; `None` for one that brought no chunks."""
        batch = self._batches.pop(request_id, None)
        if batch is None or batch.is_prompt:
            return None
        errors = {"errors": batch.errors} if batch.errors else {}
        return {"registered": [key for key in batch.keys if key not in batch.errors], **errors}


def _asked(call: Callable[..., Any], *arguments: Any, otherwise: Any) -> Any:
    return call(*arguments)  # a store that fails is said to the client
