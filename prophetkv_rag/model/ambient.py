"""A state of our own for what we compute: the caller's settings of torch reach no pass, no cache and no table.

`torch.autocast`, a default device, inference mode and gradients belong to the thread that called us, and would change
what a pass computes, or where; caches made so would lie under the same key as right ones. Two settings belong to the
whole process and are left alone, since other threads rely on them: the default dtype, which our code never uses (every
tensor is made with a dtype by name), and deterministic algorithms, which ours are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
"""Kinds of devices that a model may run on and that autocast can be switched on for."""


@contextmanager
def own_state() -> Iterator[None]:
    """Run a block, or a function that this decorates, as if the caller had set nothing; puts everything back."""
    with ExitStack() as stack:
        for kind in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # What is made under a default device passes through Python, so that is only replaced where there is one.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        # An inference tensor cannot be written in place later, outside that mode.
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield
