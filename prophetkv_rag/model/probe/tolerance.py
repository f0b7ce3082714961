"""When two tensors of the probe count as the same."""

from __future__ import annotations

import torch

from prophetkv_rag.model.devices import in_float64

# Relative to the largest entry. Half precision compares two roundings of the same number through several layers.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the largest `relative_error` that rounding in this dtype explains."""
    return _TOLERANCE.get(dtype, 2e-4)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a fraction of the largest expected entry."""
    scale = max(float(expected.abs().max()), 1e-30)
    return float((in_float64(actual) - in_float64(expected)).abs().max()) / scale
