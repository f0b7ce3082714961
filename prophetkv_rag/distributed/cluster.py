"""Finding a Ray cluster, or starting Ray on this machine for one run; nothing of it is seen by the other modules."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.extras import needs

LOCAL, RUNNING = "local", "auto"
_CONNECT_S = 5.0
_OBJECT_STORE_BYTES = 128 << 20  # Ray's default is a third of the memory; texts and counts are all that it carries here


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a Ray cluster has.

    Attributes:
        num_nodes: Machines that can run a worker.
        node_cpus: CPUs, as Ray counts them, of the machine that has fewest.
        num_cpus: CPUs in all.
        num_gpus: GPUs in all.
    """

    num_nodes: int
    node_cpus: int
    num_cpus: int
    num_gpus: int

    def share(self, num_workers: int | None, *, uses_gpus: bool) -> tuple[int, dict[str, int]]:
        """Return how many workers there will be, and what Ray is asked for each.

        Args:
            num_workers: As the user has it; `None` for one a GPU, or without GPUs one a machine.
            uses_gpus: Whether workers may run on GPUs.

        Raises:
            InputError: If the cluster has not so much.
        """
        if num_workers is not None and num_workers < 1:
            msg = f"{num_workers} workers cannot encode anything; give 1 or more"
            raise InputError(msg)
        if uses_gpus and self.num_gpus:
            wanted = num_workers or self.num_gpus
            if wanted > self.num_gpus:
                msg = f"{wanted} workers are too many: each has a GPU, and the cluster has {self.num_gpus}"
                raise InputError(msg)
            return wanted, {"num_gpus": 1, "num_cpus": 1}
        wanted = num_workers or self.num_nodes
        if wanted > self.num_cpus:
            msg = f"{wanted} workers are too many: each has a CPU at least, and the cluster has {self.num_cpus}"
            raise InputError(msg)
        a_node = -(-wanted // max(1, self.num_nodes))
        return wanted, {"num_gpus": 0, "num_cpus": max(1, self.node_cpus // a_node)}


def check_address(address: str) -> str:
    """Return an address as `connect` takes it: "local", "auto" or HOST:PORT; nothing is opened.

    Raises:
        InputError: If it is none.
    """
    host, _, port = address.rpartition(":")
    is_host_and_port = bool(host) and "/" not in host and port.isdecimal() and 0 < int(port) < 1 << 16
    if address not in (LOCAL, RUNNING) and not is_host_and_port:
        why = " (Ray Client is not supported: run this on a machine of the cluster)" if "://" in address else ""
        msg = (
            f"the Ray address is {address!r}{why}; give local (Ray is started here), auto (the one that runs here) or "
            "HOST:PORT, as `ray start --head` prints it"
        )
        raise InputError(msg)
    return address


@contextmanager
def connect(address: str = LOCAL) -> Iterator[Cluster]:
    """Be in a Ray cluster while the block runs; one that this process is in already is used, and stays.

    Raises:
        InputError: If the address is none, nobody answers there, or Ray cannot be started.
        MissingExtraError: If Ray is not installed.
    """
    check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported and started
    with needs("ray", "ray", what="indexing on several workers"):
        import ray
    if ray.is_initialized():
        yield _look(ray)
        return
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address == LOCAL:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        options["_node_ip_address"] = "127.0.0.1"  # nobody else is to reach it
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it says that it made a token
    elif address != RUNNING:
        _must_answer(address)
    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray's own, grpc's, the operating system's
        said = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
        what = "Ray cannot be started here" if address == LOCAL else f"there is no Ray cluster to join at {address}"
        msg = f"{what}: {said}"
        raise InputError(msg) from error
    try:
        yield _look(ray)
    finally:
        ray.shutdown()


def _look(ray: Any) -> Cluster:
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not resources:
        msg = "the Ray cluster has no machine with a CPU to give; start one with `ray start --address=...`"
        raise InputError(msg)
    cpus = [int(one["CPU"]) for one in resources]
    return Cluster(len(resources), min(cpus), sum(cpus), int(sum(one.get("GPU", 0) for one in resources)))


def _must_answer(address: str) -> None:
    """Ask once, as Ray's own attempts go on for a minute and end the process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        msg = (
            f"no Ray cluster answers at {address} ({error.strerror or error}); start one with `ray start --head`, or "
            "leave the address out to use this machine alone"
        )
        raise InputError(msg) from error
