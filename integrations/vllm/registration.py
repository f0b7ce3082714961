"""New chunks that requests bring: encoded by the workers, so many tokens a step at most, while the request waits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.integrations.vllm.messages import StepReport
from prophetkv_rag.store import CacheIdentity, ChunkStore

logger = logging.getLogger(__name__)


@dataclass
class _Batch:
    """One request's chunks: their keys in order, those not stored yet, and what went wrong."""

    keys: list[str]
    missing: dict[str, tuple[int, ...]]
    errors: dict[str, str] = field(default_factory=dict)


class Registrations:
    """The chunks of requests that wait for them to be stored."""

    def __init__(self, store: ChunkStore, identity: CacheIdentity, *, max_tokens: int) -> None:
        """Encode at most `max_tokens` a step (one chunk is always allowed)."""
        self._store = store
        self._identity = identity
        self._max_tokens = max_tokens
        self._batches: dict[str, _Batch] = {}
        self._running: dict[str, tuple[int, ...]] = {}

    def begin(self, request_id: str, chunks: Sequence[tuple[int, ...]], *, most: int) -> None:
        """Take a request's chunks.

        Raises:
            InputError: If one is empty, or longer than one forward may be.
        """
        most -= len(self._identity.prefix_ids)
        for number, chunk in enumerate(chunks):
            if not 0 < len(chunk) <= most:
                msg = f"chunk {number} has {len(chunk)} tokens; it must have 1 to {most}, so split it"
                raise InputError(msg)
        keys = [self._identity.key(chunk) for chunk in chunks]
        wanted = dict(zip(keys, chunks, strict=True))
        try:
            missing = {key: chunk for key, chunk in wanted.items() if key not in self._store}
        except StoreError as error:
            raise InputError(str(error)) from error
        self._batches[request_id] = _Batch(keys, missing)

    def is_waiting(self, request_id: str) -> bool:
        """Whether a request's chunks are not all stored yet."""
        batch = self._batches.get(request_id)
        return batch is not None and bool(batch.missing)

    def next_chunks(self, room: int) -> dict[str, tuple[int, ...]]:
        """Return chunks to encode in this step, which has room for so many tokens."""
        chosen: dict[str, tuple[int, ...]] = {}
        left = min(room, self._max_tokens)
        for batch in self._batches.values():
            for key, chunk in batch.missing.items():
                if key in self._running or key in chosen:
                    continue
                if left < len(chunk) and (chosen or self._running or room < self._max_tokens):
                    return self._started(chosen)
                chosen[key] = chunk
                left -= len(chunk)
        return self._started(chosen)

    def _started(self, chosen: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        self._running.update(chosen)
        return chosen

    def learn(self, report: StepReport) -> dict[str, tuple[int, ...]]:
        """Take in what was encoded; returns those chunks."""
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
        if batch is None:
            return None
        errors = {"errors": batch.errors} if batch.errors else {}
        return {"registered": [key for key in batch.keys if key not in batch.errors], **errors}
