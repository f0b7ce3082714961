"""Caches that one rank reads into RAM before the step that needs them, and what it tells the scheduler of its RAM."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future

from prophetkv_rag.integrations.vllm.messages import ReadJob, StepReport
from prophetkv_rag.store import CacheIdentity
from prophetkv_rag.store.disk import DiskStore


class RankReads:
    """A rank's reading ahead; nothing here waits for the disk, and nothing raises.

    Args:
        store: Of this process.
    """

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self._running: dict[int, list[Future[None]]] = {}
        self._said: set[str] = set()
        """Keys that the scheduler knows to be in RAM here."""

    def begin(self, jobs: Iterable[ReadJob], identity: CacheIdentity, opening: CacheIdentity) -> None:
        """Have the store's thread read what a step asks for."""
        for job in jobs:
            parts = (
                ([key for key in job.keys if key != job.first_key], identity),
                ([key for key in job.keys if key == job.first_key], opening),
            )
            begun = [self._store.read_ahead(keys, fingerprint=whose.fingerprint) for keys, whose in parts if keys]
            self._running[job.number] = [read for read in begun if read is not None]

    def tell(self, report: StepReport) -> None:
        """Say what is read by now, and how the RAM tier has changed."""
        report.read = [number for number, reads in self._running.items() if all(read.done() for read in reads)]
        for number in report.read:
            del self._running[number]
        there = self._store.keys_in_ram()
        report.came, report.went = list(there - self._said), list(self._said - there)
        self._said = there
