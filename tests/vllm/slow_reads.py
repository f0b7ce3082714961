"""Blobs that are slow to read ahead: a read does not end before it may. What a step itself reads is only noted."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from tests.vllm.failing import FailingConnector

STEPS = 5
"""That a read takes on the second rank of `SlowConnector`."""


class SlowReads:
    """Stands before a worker's blobs.

    Attributes:
        may_end: Reading ahead ends when this is set.
        ahead: Keys that were read ahead.
        in_step: Keys that a step read for the requests that it filled.
    """

    def __init__(self, stages: Any) -> None:
        self.may_end = threading.Event()
        self.ahead: list[str] = []
        self.in_step: list[str] = []
        self._stages, self._files, self._is_loading = stages, stages._store.files, False
        self._read, self._load = self._files.read, stages._load
        self._files.read, stages._load = self.read, self.load

    def read(self, key: str, **given: Any) -> Any:
        if threading.current_thread().name.startswith("prophetkv-disk"):
            self.may_end.wait()
            self.ahead.append(key)
        elif self._is_loading:
            self.in_step.append(key)
        return self._read(key, **given)

    def load(self, *arguments: Any) -> None:
        self._is_loading = True
        try:
            self._load(*arguments)
        finally:
            self._is_loading = False

    def close(self) -> None:
        self.may_end.set()
        self._stages._store.flush()
        self._files.read, self._stages._load = self._read, self._load


class SlowConnector(FailingConnector):
    """Reading ahead takes the second rank some steps, and some requests fail; for test_ranks.py."""

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """See vLLM."""
        super().register_kv_caches(kv_caches)
        stages = self.stages
        reads, run, left = SlowReads(stages), stages.run, STEPS
        log = Path(self._settings.directory).with_name(f"reads-{stages._runner.rank}.txt")
        if stages._runner.rank == 0:
            reads.may_end.set()

        def counted(plan: Any) -> Any:
            nonlocal left
            left = STEPS if plan.read_ahead else left - 1
            if left <= 0:
                reads.may_end.set()
            report = run(plan)
            log.write_text(f"{len(reads.ahead)} {len(reads.in_step)}")
            return report

        stages.run = counted
