"""What requests wait for before they are filled: that every rank has read their caches into RAM, while others decode.

Workers say with each step what came into their RAM tiers and what left them, so a request whose caches are there is
filled at once. Any other one is held back until every rank has read what it can: a cache that is bad, or was deleted
meanwhile, keeps nobody waiting. What is read for those that wait is never more than a RAM tier holds, first come, first
served: else they would push each other's caches out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prophetkv_rag.integrations.vllm.messages import ReadJob, StepReport


@dataclass(eq=False, slots=True)
class _Wait:
    """One request's caches.

    Attributes:
        job: What is read for it.
        sizes: Key -> bytes, of all of them.
        has_room: Whether room is kept for them in the RAM tiers, and the workers know of them.
        num_done: Ranks that have read what they can.
        since: When the request was first held back.
        is_over: Whether it is held back no more, although some may not be there.
    """

    job: ReadJob
    sizes: dict[str, int]
    has_room: bool = False
    num_done: int = 0
    since: float | None = None
    is_over: bool = False


class AwaitedCaches:
    """The caches that requests wait for; for one thread.

    Args:
        seconds: How long a request is held back at most; 0 for not at all.
        ram_bytes: Of each worker's RAM tier.
        size_of: Gives the bytes of a key's cache.
        count: Adds to one of the connector's counters.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        seconds: float,
        ram_bytes: int,
        *,
        size_of: Callable[[str], int],
        count: Callable[[str, float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._ram_bytes = ram_bytes
        self._size_of = size_of
        self._count = count
        self._clock = clock
        self._waits: dict[str, _Wait] = {}
        self._unread: dict[int, _Wait] = {}
        """Number of the job -> what no room was found for yet, in order."""
        self._being_read: dict[int, _Wait] = {}
        self._filled: list[_Wait] = []
        """What this step takes from the RAM tiers, while it begins to read for others."""
        self._number = 0
        self._users = Counter[str]()
        self._sizes: dict[str, int] = {}
        """Of the caches that have room."""
        self._ranks_with = Counter[str]()
        self._num_ranks = 1

    def __len__(self) -> int:
        return len(self._waits)

    def expect(self, request_id: str, keys: Sequence[str], first_key: str) -> None:
        """Have caches read ahead for a request that will be filled from them.

        Args:
            request_id: vLLM's.
            keys: Of the caches, which are stored.
            first_key: The one among them that is a second cache; "" for none.
        """
        former = self._forget(request_id)
        if former is not None:
            self._give_back(former)
        self._number += 1
        sizes = {key: self._size_of(key) for key in keys}
        wait = self._waits[request_id] = _Wait(ReadJob(self._number, tuple(sizes), first_key), sizes)
        if former is not None and not former.is_over:
            wait.since = former.since
        if sum(sizes.values()) <= self._ram_bytes:
            self._unread[self._number] = wait
        else:
            wait.is_over = True  # they are never all there

    def next_jobs(self) -> list[ReadJob]:
        """Return what the workers begin to read in this step."""
        begun = []
        loaded = {key: size for wait in self._filled for key, size in wait.sizes.items()}
        for wait in self._unread.values():
            sizes = wait.sizes | self._sizes
            if sum((loaded | sizes).values()) > self._ram_bytes:
                break
            self._sizes = sizes
            self._users.update(wait.sizes.keys())
            wait.has_room = True
            begun.append(wait)
        for wait in begun:
            del self._unread[wait.job.number]
            self._being_read[wait.job.number] = wait
        for wait in self._filled:
            self._give_back(wait)
        self._filled = []
        return [wait.job for wait in begun]

    def is_ready(self, request_id: str, keys: Sequence[str], first_key: str) -> bool:
        """Whether a request is filled now; `keys` and `first_key` as above. Else ask in the next step again."""
        if not self._seconds:
            return True
        wait = self._waits.get(request_id)
        if wait is None or not wait.sizes.keys() >= set(keys):
            self.expect(request_id, keys, first_key)
            wait = self._waits[request_id]
        if wait.is_over or all(self._ranks_with[key] >= self._num_ranks for key in keys):
            self._end(wait)
        elif wait.since is None:
            wait.since = self._clock()
            self._count("read_ahead_waits", 1)
        elif self._clock() - wait.since >= self._seconds:
            self._count("read_ahead_late", 1)
            self._end(wait)
        return wait.is_over

    def learn(self, report: StepReport) -> None:
        """Take in what the ranks have read, and what their RAM tiers hold now."""
        self._num_ranks = report.num_ranks
        self._ranks_with.update(report.came)
        self._ranks_with.subtract(report.went)
        for key in report.went:
            if self._ranks_with[key] <= 0:
                del self._ranks_with[key]
        for number in report.read:
            wait = self._being_read.get(number)
            if wait is not None:
                wait.num_done += 1
                if wait.num_done >= self._num_ranks:
                    self._end(wait)

    def finish(self, request_id: str) -> None:
        """Let go of a request that is filled in this step, or never."""
        wait = self._forget(request_id)
        if wait is not None:
            self._end(wait)
            self._filled.append(wait)

    def _end(self, wait: _Wait) -> None:
        if not wait.is_over and wait.since is not None:
            self._count("read_ahead_seconds", self._clock() - wait.since)
        wait.is_over = True

    def _forget(self, request_id: str) -> _Wait | None:
        wait = self._waits.pop(request_id, None)
        if wait is not None:
            self._unread.pop(wait.job.number, None)
            self._being_read.pop(wait.job.number, None)
        return wait

    def _give_back(self, wait: _Wait) -> None:
        if wait.has_room:
            self._users.subtract(wait.sizes.keys())
            for key in wait.sizes:
                if not self._users[key]:
                    del self._users[key], self._sizes[key]
