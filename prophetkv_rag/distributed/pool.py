"""Workers that are kept at work: each gets a job when it has done one, and what a dead one had goes to another."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from prophetkv_rag.distributed.cluster import Cluster
from prophetkv_rag.distributed.settings import WorkerSettings
from prophetkv_rag.distributed.worker import ChunkWorker, Failed, WorkerInfo, close, start
from prophetkv_rag.errors import InputError, WorkerError

logger = logging.getLogger(__name__)

J = TypeVar("J")

_AHEAD = 2  # jobs of a worker, the one that it does included: it need not wait for the caller
_MOST_DEATHS = 3
_START_S = 900.0  # a large model takes long to load
_CLOSE_S = 10.0


class Jobs(Protocol[J]):
    """What is to be done."""

    def take(self) -> J | None:
        """Return the next job; `None` if there is none now."""

    def give_back(self, job: J) -> None:
        """Take back what a dead worker had."""

    def name(self, job: J) -> str:
        """Return what to call a job in messages."""


class WorkerPool:
    """Ray actors with a `ChunkWorker` each; a context manager, whose end ends them.

    Args:
        cluster: Where they run.
        settings: What each is made from.
        name: Of what the caller has left for them (`meeting`).
        num_workers: How many; `None` for one a GPU, or a machine.

    Attributes:
        workers: Those that have started, dead ones included.
        deaths: How many have died.

    Raises:
        InputError: If the cluster has not so much.
    """

    def __init__(self, cluster: Cluster, settings: WorkerSettings, name: str, num_workers: int | None = None) -> None:
        self.num_workers, self._resources = cluster.share(num_workers, uses_gpus=settings.device != "cpu")
        if not self._resources["num_gpus"] and settings.device == "auto":  # a GPU that Ray does not count is not theirs
            settings = replace(settings, device="cpu")
        self._start = (settings, name)
        self._starting: dict[Any, Any] = {}
        self._ready: dict[Any, int] = {}
        self.deaths = 0
        self.workers: list[WorkerInfo] = []

    def __enter__(self) -> Self:
        for _ in range(self.num_workers):
            self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import ray

        if kind is None and self._ready:
            ends = [actor.call.remote(close, None) for actor in self._ready]
            ray.wait(ends, num_returns=len(ends), timeout=_CLOSE_S)
        for actor in (*self._ready, *self._starting.values()):
            ray.kill(actor)

    def run(
        self, function: Callable[[ChunkWorker, Any], Any], jobs: Jobs[J], argument: Callable[[J], Any]
    ) -> Iterator[tuple[J, Any]]:
        """Do all jobs; yields each with its result, as they end. The caller is done with one when it asks for the next.

        Args:
            function: Does a job; of a module that all machines have.
            jobs: What is to be done.
            argument: What `function` is called with for a job.

        Raises:
            InputError: If a worker cannot be used, or a job is refused.
            WorkerError: If no worker starts, or several have died of one job.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        running: dict[Any, tuple[Any, J]] = {}
        died_of: Counter[str] = Counter()
        while True:
            for actor in self._ready:
                while self._ready[actor] < _AHEAD and (job := jobs.take()) is not None:
                    running[actor.call.remote(function, argument(job))] = actor, job
                    self._ready[actor] += 1
            if self._ready and not running:
                return
            ended, _ = ray.wait([*running, *self._starting], timeout=None if running else _START_S)
            if not ended:
                raise WorkerError(_no_worker(self._resources))
            if ended[0] in self._starting:
                self._started(ended[0])
                continue
            actor, job = running.pop(ended[0])
            try:
                result = ray.get(ended[0])
            except RayTaskError:  # an error of ours, with the worker's own traceback
                raise
            except RayError as error:
                jobs.give_back(job)
                name = jobs.name(job)
                died_of[name] += 1
                if died_of[name] >= _MOST_DEATHS:
                    msg = f"{_MOST_DEATHS} workers have died, each with {name}: {_first_line(error)}"
                    raise WorkerError(msg) from error
                self._replace(actor, error)
                continue
            self._ready[actor] -= 1
            if isinstance(result, Failed):
                raise InputError(result.message)
            yield job, result

    def _begin(self) -> None:
        import ray

        actors = ray.remote(ChunkWorker).options(max_restarts=0, scheduling_strategy="SPREAD", **self._resources)
        actor = actors.remote()
        self._starting[actor.call.remote(start, self._start)] = actor

    def _started(self, reference: Any) -> None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        actor = self._starting.pop(reference)
        try:
            info = ray.get(reference)
        except RayTaskError:
            raise
        except RayError as error:
            self._ready[actor] = 0
            self._replace(actor, error)
            return
        if isinstance(info, Failed):
            raise InputError(info.message)
        self.workers.append(info)
        self._ready[actor] = 0

    def _replace(self, actor: Any, error: Exception) -> None:
        if actor not in self._ready:  # each of its jobs says that it is dead
            return
        del self._ready[actor]
        self.deaths += 1
        if self.deaths >= _MOST_DEATHS * self.num_workers:
            msg = f"{self.deaths} workers have died; the last: {_first_line(error)}"
            raise WorkerError(msg) from error
        logger.warning("a worker has died (%s); another one goes on with what it had", _first_line(error))
        self._begin()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _no_worker(resources: dict[str, int]) -> str:
    wanted = " and ".join(f"{count} {name.removeprefix('num_')}" for name, count in resources.items() if count)
    return (
        f"no worker has started in {_START_S:.0f} s: each needs {wanted}, which the cluster may have given to others; "
        "`ray status` says to whom. Give fewer workers, or wait"
    )
