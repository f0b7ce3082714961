"""Caches that one rank reads into RAM before the step that needs them, and what it tells the scheduler of its RAM."""

from __future__ import annotations

from concurrent.futures import Future, wait

from prophetkv_rag.integrations.vllm.identity import opening_of
from prophetkv_rag.integrations.vllm.messages import StepPlan, StepReport
from prophetkv_rag.store.disk import DiskStore

_MOMENT_S = 0.005
"""That an empty step lasts while something is read."""


class RankReads:
    """A rank's reading ahead; nothing here waits for the disk while others decode, and nothing raises.

    Args:
        store: Of this process.
    """

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self._running: dict[int, list[Future[None]]] = {}
        self._said: set[str] = set()
        """Keys that the scheduler knows to be in RAM here."""

    def begin(self, plan: StepPlan) -> None:
        """Have the store's thread read what a step asks for, and not in the place of what this step loads."""
        loaded = [key for load in plan.loads for key in (load.first_key, *(match.key for match in load.matches))]
        self._store.keep_in_ram([*loaded, *(key for job in plan.read_ahead for key in job.keys)])
        for job in plan.read_ahead:
            parts = (
                ([key for key in job.keys if key != job.first_key], plan.identity),
                ([key for key in job.keys if key == job.first_key], opening_of(plan.identity)),
            )
            begun = [self._store.read_ahead(keys, fingerprint=whose.fingerprint) for keys, whose in parts if keys]
            self._running[job.number] = [read for read in begun if read is not None]

    def give_way(self) -> None:
        """Wait a moment for what is being read: vLLM would take empty steps one after the other, which slow it down."""
        running = [read for reads in self._running.values() for read in reads]
        if running:
            wait(running, _MOMENT_S, return_when="FIRST_COMPLETED")

    def tell(self, report: StepReport) -> None:
        """Say what is read by now, and how the RAM tier has changed."""
        report.read = [number for number, reads in self._running.items() if all(read.done() for read in reads)]
        for number in report.read:
            del self._running[number]
        there = self._store.keys_in_ram()
        report.came, report.went = list(there - self._said), list(self._said - there)
        self._said = there
