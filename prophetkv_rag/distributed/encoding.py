"""Sending documents to workers, each chunk to one of them, and what came of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prophetkv_rag.config import Encoding
from prophetkv_rag.distributed.pool import WorkerPool
from prophetkv_rag.distributed.schedule import Schedule
from prophetkv_rag.distributed.worker import Encoded, EncodeJob, encode
from prophetkv_rag.errors import StoreError
from prophetkv_rag.text import well_formed

logger = logging.getLogger(__name__)

SIDE_BY_SIDE = 8
"""Documents that a worker encodes at once, a chunk of each in a batch (`chunks.order`)."""


@dataclass(slots=True)
class Totals:
    """What workers have done: chunks that their models ran for, and those that were there already."""

    computed: int = 0
    found: int = 0
    _told: set[str] = field(default_factory=set)

    def add(self, result: Encoded) -> None:
        """Count a job, and say what its worker warned of, each thing once."""
        self.computed += result.computed
        self.found += max(0, result.chunks - result.computed - result.not_kept)
        for message in result.told:
            if message not in self._told:
                self._told.add(message)
                logger.warning("a worker says: %s", message)


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents as the schedule sees them.

    Attributes:
        texts: The chunks of each, in order.
        keys: Their cache keys.
        lengths: Tokens of each document.
    """

    texts: Sequence[Sequence[str]]
    keys: Sequence[Sequence[str]]
    lengths: Sequence[int]

    @classmethod
    def of(
        cls,
        texts: Sequence[Sequence[str]],
        tokens_of: Callable[[str], Sequence[int]],
        key_of: Callable[[Sequence[int]], str],
    ) -> Documents:
        """Tokenise documents, none of whose texts is blank."""
        keys, lengths = [], []
        for document in texts:
            ids = [tokens_of(well_formed(text).strip()) for text in document]
            keys.append([key_of(chunk) for chunk in ids])
            lengths.append(sum(map(len, ids)))
        return cls(texts, keys, lengths)

    def only(self, numbers: Sequence[int]) -> Documents:
        """Return some of them."""
        return Documents(
            [self.texts[number] for number in numbers],
            [self.keys[number] for number in numbers],
            [self.lengths[number] for number in numbers],
        )


class DocumentJobs(Schedule):
    """A `Schedule` that makes jobs of its documents.

    Args:
        documents: The documents.
        encoding: Behind how many chunks of its document a chunk stands.
        traces: Returns, for a key, those that the cache which is there already bears the trace of, as far as they
            are known.
        embedder: See `EncodeJob`.
        num_workers: Who share them.
        batch_tokens: Tokens of one batch.
    """

    def __init__(
        self,
        documents: Documents,
        encoding: Encoding,
        traces: Callable[[str], Iterable[str]],
        *,
        embedder: str,
        num_workers: int,
        batch_tokens: int,
    ) -> None:
        side_by_side = min(SIDE_BY_SIDE, len(documents.keys) // (4 * num_workers))
        super().__init__(
            documents.keys, documents.lengths, side_by_side=side_by_side, job_tokens=SIDE_BY_SIDE // 2 * batch_tokens
        )
        self._documents = documents
        self._count = encoding.count if encoding.kind == "previous" else 0
        self._traces = traces
        self._embedder = embedder

    def name(self, job: Sequence[int]) -> str:
        """See `pool.Jobs.name`."""
        first = self._documents.texts[job[0]]
        return f"{len(job)} documents, the first of which begins {(first[0] if first else '')[:40]!r}"

    def argument(self, job: Sequence[int]) -> EncodeJob:
        """Return what a worker is called with."""
        given: set[str] = set()
        known: set[str] = set()
        for number in job if self._count else ():
            keys = self._documents.keys[number]
            known.update(*(self._traces(key) for key in keys))
            for key, text in zip(keys, self._documents.texts[number], strict=True):
                if self.owner[key] != number:
                    given.add(text)
                    known |= self._traces_in_this_run(key)
        documents = tuple(tuple(self._documents.texts[number]) for number in job)
        return EncodeJob(documents, frozenset(given), tuple(known), self._embedder)

    def _traces_in_this_run(self, key: str) -> set[str]:
        found: set[str] = set()
        left = [key]
        while left:
            one = left.pop()
            keys, place = self._documents.keys[self.owner[one]], self.place[one]
            before = set(keys[max(0, place - self._count) : place]) - found - {one}
            found |= before
            left += before
        return found


def encode_documents(
    pool: WorkerPool,
    documents: Documents,
    totals: Totals,
    *,
    encoding: Encoding,
    batch_tokens: int,
    traces: Callable[[str], Iterable[str]] = lambda key: (),
    embedder: str = "",
) -> Iterator[tuple[list[int], Sequence[list[list[float]]]]]:
    """Have documents encoded; yields the numbers of those whose caches are there, and their embeddings if asked for.

    What waits for them (documents that have a chunk in common with one of them) is sent out when the caller asks for
    the next.

    Raises:
        InputError: If a worker cannot be used, or a chunk cannot be encoded.
        WorkerError: If workers die again and again.
        StoreError: If caches could not be kept: the remote tier is full, or does not take them.
    """
    jobs = DocumentJobs(
        documents, encoding, traces, embedder=embedder, num_workers=pool.num_workers, batch_tokens=batch_tokens
    )
    left = set(range(len(documents.keys)))
    for job, result in pool.run(encode, jobs, jobs.argument):
        totals.add(result)
        if result.not_kept:
            msg = (
                f"{result.not_kept} of {result.chunks} caches could not be kept: {result.reason}. What was computed so "
                "far is kept: make room and run this again, and only the rest is computed"
            )
            raise StoreError(msg)
        yield job, result.vectors
        jobs.done(job)
        left.difference_update(job)
    assert not left, "documents were never sent out"
