"""How torch's threads wait for each other on a CPU: asleep, as far as that can still be chosen.

By default OpenMP's threads spin for a while before they sleep. That saves microseconds on cores that nobody else wants,
and costs a multiple of the time as soon as another program runs: a thread that has work waits for its core until one
that spins there gives it up. OpenMP reads the choice from the environment, once, when torch is loaded.
"""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger(__name__)

POLICY = "OMP_WAIT_POLICY"
_CHOICES = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_could_choose = "torch" not in sys.modules
_has_advised = False


def wait_asleep() -> None:
    """Have threads sleep while they wait, unless torch is loaded already or the user has chosen; nothing else changes.

    Called when the package is imported.
    """
    if _could_choose and not any(name in os.environ for name in _CHOICES):
        os.environ[POLICY] = "PASSIVE"


def advise(num_threads: int) -> None:
    """Say once what to set, where threads spin: loudly if other programs want the cores now.

    Args:
        num_threads: Threads that torch computes with.
    """
    global _has_advised
    if _has_advised or num_threads < 2 or any(name in os.environ for name in _CHOICES):
        return
    _has_advised = True
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    logger.log(
        logging.WARNING if load > num_threads else logging.INFO,
        "torch was loaded before prophetkv_rag, so its %d threads spin while they wait, which makes everything several "
        "times slower where other programs use the cores (the load is %.1f): import prophetkv_rag before torch, or set "
        "%s=PASSIVE",
        num_threads,
        load,
        POLICY,
    )
