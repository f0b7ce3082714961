"""Work with collectives in it: all ranks do it, or fail at it alike; else vLLM ends, rather than hang."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from vllm.distributed import get_tp_group

logger = logging.getLogger(__name__)

PATIENCE_S = 20
"""How long a rank that has failed waits for the others. They wait in a collective that it will never join, unless they
failed as well."""


def run_together(work: Callable[[], None]) -> Exception | None:
    """Do work on this rank; returns its exception if it failed on all ranks. Every rank must call this.

    If it failed on some ranks only, the others cannot be called back, so this process ends: vLLM notices, and says so.
    """
    error: Exception | None = None
    try:
        work()
    except Exception as raised:
        error = raised
    group = get_tp_group()
    if group.world_size == 1:
        return error
    failed = torch.tensor([int(error is not None)])
    try:
        # Not the group that the work itself may hang in.
        asked = dist.all_reduce(failed, group=group.cpu_group, async_op=True)
        if error is None:
            asked.wait()
        else:
            asked.wait(timedelta(seconds=PATIENCE_S))
    except Exception as lost:
        _end(f"the ranks of vLLM are not in step any more: {error or lost}")
    if int(failed) not in (0, group.world_size):
        _end(f"{int(failed)} of {group.world_size} ranks failed: {error}")
    return error


def _end(reason: str) -> NoReturn:
    """End this process at once: an ordinary exit would wait for the other ranks."""
    logger.critical("this rank ends, as %s", reason)
    logging.shutdown()
    os._exit(1)
