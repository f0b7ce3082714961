"""Which documents are encoded next, and together. Pure bookkeeping."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

MAX_DOCUMENTS = 64
"""Documents of one job; each is a network request a chunk, before anything is computed."""


class Schedule:
    """Documents that are ready, in jobs; each chunk is encoded by one job, whichever documents have it.

    A document is one unit: its chunks stand behind each other. One that has a chunk of an earlier one waits for that
    one to be done, so that no two workers compute the same chunk.

    Args:
        documents: The keys of each document's chunks, in order.
        lengths: Tokens of each.
        side_by_side: Documents that a worker encodes at once, where there are enough for all workers.
        job_tokens: As many short documents make a job as have so many tokens together.
    """

    def __init__(
        self, documents: Sequence[Sequence[str]], lengths: Sequence[int], *, side_by_side: int, job_tokens: int
    ) -> None:
        self._lengths = lengths
        self._side_by_side = max(1, side_by_side)
        self._job_tokens = job_tokens
        self.owner: dict[str, int] = {}
        """Key -> the document that it is encoded with."""
        self._waits_for: list[set[int]] = []
        self._followers: dict[int, list[int]] = {}
        self.place: dict[str, int] = {}
        """Key -> where it stands in that document."""
        for number, keys in enumerate(documents):
            for place, key in enumerate(keys):
                if self.owner.setdefault(key, number) == number:
                    self.place.setdefault(key, place)
            owners = {self.owner[key] for key in keys} - {number}
            self._waits_for.append(owners)
            for other in owners:
                self._followers.setdefault(other, []).append(number)
        ready = [number for number, owners in enumerate(self._waits_for) if not owners]
        # The longest first: a long one that begins last would be waited for by all.
        self._returned: deque[list[int]] = deque()
        self._ready = deque(sorted(ready, key=lambda number: lengths[number], reverse=True))

    def take(self) -> list[int] | None:
        """Return the documents of the next job; `None` if none is ready."""
        if self._returned:
            return self._returned.popleft()
        job: list[int] = []
        tokens = 0
        while self._ready and len(job) < MAX_DOCUMENTS:
            if len(job) >= self._side_by_side and tokens >= self._job_tokens:
                break
            number = self._ready.popleft()
            job.append(number)
            tokens += self._lengths[number]
        return job or None

    def give_back(self, job: list[int]) -> None:
        """Take a job back that nobody did: it is the next."""
        self._returned.append(job)

    def done(self, job: Sequence[int]) -> None:
        """Note that a job's caches are where all workers find them; what waited for it may be ready now."""
        for number in job:
            for follower in self._followers.get(number, ()):
                self._waits_for[follower].discard(number)
                if not self._waits_for[follower]:
                    self._ready.append(follower)
