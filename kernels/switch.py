"""The one place where an operation's implementation is picked: by the tensors' device, the environment or `force`."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch

logger = logging.getLogger(__name__)

CHOICES = ("auto", "triton", "reference")
VARIABLE = "PROPHETKV_KERNELS"

_forced: str | None = None
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _checked(choice: str, source: str) -> str:
    if choice not in CHOICES:
        msg = f"{source} is {choice!r}; allowed: {', '.join(CHOICES)}"
        raise ValueError(msg)
    return choice


def _choice() -> str:
    return _forced or _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


@contextmanager
def force(choice: str) -> Iterator[None]:
    """Use one implementation inside the block, in all threads: `"triton"`, `"reference"`, or `"auto"`.

    `"triton"` makes tensors on a CPU take the kernels too, which works in Triton's interpreter only.

    Raises:
        ValueError: For any other choice.
    """
    global _forced
    previous, _forced = _forced, _checked(choice, "the implementation")
    try:
        yield
    finally:
        _forced = previous


@cache
def triton_kernels() -> ModuleType | None:
    """Return the package of Triton kernels, or `None`, said once, where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        logger.warning("triton is not installed: GPU tensors take the PyTorch code, which is slower")
        return None
    from prophetkv_rag.kernels import triton

    return triton


@cache
def say_once(reason: str) -> None:
    """Log why tensors that should take the Triton kernels do not."""
    logger.warning("the Triton kernels are not used: %s", reason)


def _kernels_on(is_gpu: bool) -> ModuleType | None:
    choice = _choice()
    return None if choice == "reference" or (choice == "auto" and not is_gpu) else triton_kernels()


def in_use(device: torch.device | str) -> str:
    """Name the implementation that tensors on `device` take, for reports: `"triton 3.7.1"` or `"pytorch"`.

    Raises:
        ValueError: If the environment variable is none of `CHOICES`.
    """
    kernels = _kernels_on(torch.device(device).type == "cuda")
    return "pytorch" if kernels is None else f"triton {version('triton')}"


def kernels_for(tensors: Sequence[torch.Tensor]) -> ModuleType | None:
    """Return the package of Triton kernels if these tensors take them, else `None`."""
    kernels = _kernels_on(tensors[0].is_cuda)
    reason = None if kernels is None else kernels.why_not(tensors)
    if reason is None:
        return kernels
    say_once(reason)
    return None


def run(
    reference: Callable[_Arguments, _Result],
    tensors: Sequence[torch.Tensor],
    *arguments: _Arguments.args,
    **options: _Arguments.kwargs,
) -> _Result:
    """Call the PyTorch function `reference`, or the Triton launcher of its name if `tensors` take that."""
    kernels = kernels_for(tensors)
    if kernels is None:
        return reference(*arguments, **options)
    launcher: Callable[_Arguments, _Result] = getattr(kernels, reference.__name__)
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        return launcher(*arguments, **options)
