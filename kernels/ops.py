"""The tensor operations of the reuse path, and the one place where an implementation is picked.

Every operation has a PyTorch implementation (`reference.py`, `reference_rows.py`, `reference_scores.py`), which is also
the CPU path, and a Triton kernel of the same signature, which runs whenever the tensors are on a CUDA or ROCm device.
`PROPHETKV_KERNELS=reference` (or `triton`, or `auto`) and `force` override that, for debugging.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from prophetkv_rag.kernels import reference, reference_rows, reference_scores
from prophetkv_rag.kernels.row_blocks import RowBlocks
from prophetkv_rag.kernels.row_source import RowSource

__all__ = [
    "CHOICES",
    "RowBlocks",
    "RowSource",
    "add_query_scores",
    "attend_and_score",
    "force",
    "in_use",
    "log_sum_exp",
    "rope_gather",
    "rope_scatter",
    "rotate",
    "selected_rows_attention",
]

logger = logging.getLogger(__name__)

CHOICES = ("auto", "triton", "reference")
VARIABLE = "PROPHETKV_KERNELS"

_forced: str | None = None


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
def _triton_ops() -> Any:
    """Return the module of Triton kernels, or `None`, said once, where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        logger.warning("triton is not installed: GPU tensors take the PyTorch code, which is slower")
        return None
    from prophetkv_rag.kernels import triton_ops

    return triton_ops


@cache
def _say_once(reason: str) -> None:
    logger.warning("the Triton kernels are not used: %s", reason)


def _triton_for(*tensors: torch.Tensor) -> Any:
    """Return the module of Triton kernels if these tensors take them, else `None`."""
    choice = _choice()
    if choice == "reference" or (choice == "auto" and not tensors[0].is_cuda):
        return None
    kernels = _triton_ops()
    if kernels is None:
        return None
    reason = kernels.why_not(tensors)
    if reason is not None:
        _say_once(reason)
        return None
    return kernels


def in_use(device: torch.device | str) -> str:
    """Name the implementation that tensors on `device` take, for reports: `"triton 3.7.1"` or `"pytorch"`.

    Raises:
        ValueError: If the environment variable is none of `CHOICES`.
    """
    choice = _choice()
    is_gpu = torch.device(device).type == "cuda"
    if choice == "reference" or (choice == "auto" and not is_gpu) or _triton_ops() is None:
        return "pytorch"
    return f"triton {version('triton')}"


def _run(name: str, instead: Any, tensors: Sequence[torch.Tensor], *arguments: Any, **options: Any) -> Any:
    """Call the Triton launcher `name`, or the function of that name in `instead`."""
    kernels = _triton_for(*tensors)
    if kernels is None:
        return getattr(instead, name)(*arguments, **options)
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        return getattr(kernels, name)(*arguments, **options)


def rotate(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See `reference.rotate`."""
    rotated: torch.Tensor = _run("rotate", reference, (states,), states, cos, sin, interleaved=interleaved, out=out)
    return rotated


def rope_gather(
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    sources: Sequence[RowSource],
    starts: Sequence[int],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    interleaved: bool = False,
) -> None:
    """See `reference_rows.rope_gather`."""
    arguments = (key_out, value_out, sources, starts, cos, sin)
    unknown = next((source.unknown_dtype for source in sources if source.unknown_dtype is not None), None)
    if unknown is not None:
        if _triton_for(key_out, value_out) is not None:
            _say_once(f"chunks are stored as {unknown}")
        reference_rows.rope_gather(*arguments, interleaved=interleaved)
        return
    _run("rope_gather", reference_rows, (key_out, value_out), *arguments, interleaved=interleaved)


def rope_scatter(
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    **options: Any,
) -> torch.Tensor | None:
    """See `reference_rows.rope_scatter`."""
    tensors = (key, value, key_out, value_out)
    arguments = (key, value, rows, key_out, value_out)
    query: torch.Tensor | None = _run("rope_scatter", reference_rows, tensors, *arguments, **options)
    return query


def selected_rows_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, blocks: RowBlocks, **options: Any
) -> torch.Tensor:
    """See `reference.selected_rows_attention`."""
    tensors = (query, keys, values)
    output: torch.Tensor = _run("selected_rows_attention", reference, tensors, *tensors, blocks, **options)
    return output


def attend_and_score(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, blocks: RowBlocks, **options: Any
) -> torch.Tensor:
    """See `reference.attend_and_score`."""
    tensors = (query, keys, values)
    output: torch.Tensor = _run("attend_and_score", reference, tensors, *tensors, blocks, **options)
    return output


def log_sum_exp(query: torch.Tensor, keys: torch.Tensor, blocks: RowBlocks, **options: Any) -> torch.Tensor:
    """See `reference_scores.log_sum_exp`."""
    lse: torch.Tensor = _run("log_sum_exp", reference_scores, (query, keys), query, keys, blocks, **options)
    return lse


def add_query_scores(
    mass: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    blocks: RowBlocks,
    **options: Any,
) -> None:
    """See `reference_scores.add_query_scores`."""
    _run("add_query_scores", reference_scores, (query, keys), mass, query, keys, lse, blocks, **options)
