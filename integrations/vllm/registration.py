"""Caches to compute: new chunks that requests bring, and what prompts find missing; some tokens a step at most."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prophetkv_rag.errors import InputError, StoreError
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
        count: So many chunks stand before each one of a document.
        max_tokens: Encode at most so many a step (one chunk is always allowed).
    """

    def __init__(self, store: ChunkStore, identity: CacheIdentity, *, count: int, max_tokens: int) -> None:
        self._store = store
        self._identity = identity
        self._count = count
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
        try:
            before = self._before(keys, options)
            missing = {
                key: EncodeJob(chunk, before.get(key, ()))
                for key, chunk in zip(keys, options.register, strict=True)
                if key not in self._store or (key in before and not self._store.behind(key).keys)
            }
        except StoreError as error:
            raise InputError(str(error)) from error
        self._batches[request_id] = _Batch(keys, missing)

    def await_caches(self, request_id: str, missing: Mapping[str, EncodeJob]) -> None:
        """Have a prompt wait for what it found missing."""
        self._batches[request_id] = _Batch([], dict(missing), is_prompt=True)

    def _before(self, keys: list[str], options: RequestOptions) -> dict[str, tuple[str, ...]]:
        """Return what chunks stand behind: of what comes before them in the request, or is known."""
        if not self._count or not (options.in_order or options.behind):
            return {}
        named = options.behind or [keys[max(0, number - self._count) : number] for number in range(len(keys))]
        earlier: set[str] = set()
        known = self._store.known({one for found in named for one in found})
        before: dict[str, tuple[str, ...]] = {}
        for key, found in zip(keys, named, strict=True):
            chosen = tuple(dict.fromkeys(one for one in found if one != key and (one in earlier or one in known)))
            if chosen and key not in earlier:
                before[key] = chosen[-self._count :]
            earlier.add(key)
        return before

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
                is_full = left < len(job.input_ids) and bool(chosen or self._running or room < self._max_tokens)
                if is_full:
                    self.reserved = 0 if chosen else min(len(job.input_ids), self._max_tokens)
                    break
                chosen[key] = job
                left -= len(job.input_ids)
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
