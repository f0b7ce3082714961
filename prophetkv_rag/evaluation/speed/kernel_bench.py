"""How long each GPU kernel takes, beside what the device could do at best and beside PyTorch's own ways.

First the ceilings, measured on the same device: bytes per second of a copy and operations per second of a matrix
product. A kernel's limit is the longer of its bytes at the one and its operations at the other; its share of the
roofline is that limit over its time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from prophetkv_rag.evaluation.speed.kernel_works import Shape, works

NOT_MEASURED = "not measured: no CUDA or ROCm device"
CEILING_SIZE = 8192

Timer = Callable[[Callable[[], object]], list[float]]
"""Runs a function repeatedly; returns the median, the 10% and the 90% quantile in milliseconds."""


@dataclass(slots=True)
class KernelTime:
    """One line of the table; times in milliseconds, `None` where nothing was measured.

    `gigabytes` are what must be read and written at least, `gigaflops` the operations of the matrix products.
    """

    kernel: str
    variant: str
    gigabytes: float
    gigaflops: float
    ms: float | None = None
    ms_10: float | None = None
    ms_90: float | None = None
    limit_ms: float | None = None
    share_of_roofline: float | None = None


def has_device() -> bool:
    """Whether there is anything to measure on."""
    return torch.cuda.is_available()


def gpu_timer(function: Callable[[], object]) -> list[float]:
    """Triton's own: warm-up, the L2 cache flushed before every run, quantiles of the device's time."""
    from triton.testing import do_bench

    quantiles: list[float] = do_bench(function, warmup=50, rep=300, quantiles=[0.5, 0.1, 0.9])
    return quantiles


def measure_kernels(
    shape: Shape,
    *,
    device: str = "cuda",
    timer: Timer = gpu_timer,
    ceiling_size: int = CEILING_SIZE,
    on_step: Callable[[int], None] = lambda steps: None,
) -> dict[str, Any]:
    """Measure every kernel and its peers; without a device the same table with nothing in it.

    Args:
        shape: One layer's work.
        device: Where.
        timer: How; the tests count instead.
        ceiling_size: Side of the matrices that the ceilings are measured on.
        on_step: Called with 1 after each line.

    Returns:
        `shape`, `ceilings` (GB/s and TFLOP/s, or `None`), `kernels` (rows of `KernelTime`) and `note` ("" if measured).
    """
    if device == "cuda" and not has_device():
        rows = [KernelTime(work.kernel, work.variant, work.gigabytes, work.gigaflops) for work in works(shape, "cpu")]
        return _report(shape, None, None, rows, NOT_MEASURED)
    bandwidth, rate = _ceilings(device, shape.torch_dtype, timer, ceiling_size)
    rows = []
    for work in works(shape, device):
        median, low, high = timer(work.make())
        limit = max(work.gigabytes / bandwidth, work.gigaflops / (rate * 1e3)) * 1e3
        share = limit / median
        rows.append(
            KernelTime(work.kernel, work.variant, work.gigabytes, work.gigaflops, median, low, high, limit, share)
        )
        on_step(1)
    return _report(shape, bandwidth, rate, rows, "")


def count_lines(shape: Shape) -> int:
    """How many lines the table will have."""
    return len(works(shape, "cpu"))


def _report(
    shape: Shape, bandwidth: float | None, rate: float | None, rows: list[KernelTime], note: str
) -> dict[str, Any]:
    return {
        "shape": asdict(shape),
        "ceilings": {"copy_gb_per_s": bandwidth, "matmul_tflop_per_s": rate},
        "kernels": [asdict(row) for row in rows],
        "note": note,
    }


def _ceilings(device: str, dtype: torch.dtype, timer: Timer, size: int) -> tuple[float, float]:
    source = torch.empty(size * size * 2, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_ms = timer(lambda: target.copy_(source))[0]
    square = torch.randn(size, size, dtype=torch.float32, device=device).to(dtype)
    matmul_ms = timer(lambda: square @ square)[0]
    return 2 * source.nbytes / 1e9 / (copy_ms / 1e3), 2 * size**3 / 1e12 / (matmul_ms / 1e3)
