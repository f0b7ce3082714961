"""Devices and dtypes by their names, and what a device cannot do."""

from __future__ import annotations

import torch

from prophetkv_rag.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str) -> torch.dtype | None:
    """Return the dtype of that name, `None` for `"auto"`; `InputError` for another."""
    if name != "auto" and name not in DTYPES:
        msg = f"the dtype is {name!r}; allowed: auto, {', '.join(DTYPES)}"
        raise InputError(msg)
    return DTYPES.get(name)


def device_of(name: str | torch.device) -> torch.device | None:
    """Return the device of that name, `None` for `"auto"`; `InputError` if it is not here."""
    if name == "auto":
        return None
    here = _here()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {one.partition(":")[0] for one in here}:
        msg = f"the device is {str(name)!r}; here are: {', '.join(here)}{_why_not(str(name))}"
        raise InputError(msg)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        msg = f"the device is {str(name)!r}; here are: {', '.join(here)}"
        raise InputError(msg)
    return device


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, on the CPU if its device (Apple's MPS) has no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def _here() -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _why_not(name: str) -> str:
    if name.startswith("cuda") and torch.version.cuda is None and torch.version.hip is None:
        return " (torch is built without CUDA and ROCm: install a build for the GPU)"
    if name.startswith("cuda"):
        return " (torch finds no GPU: is its driver there?)"
    if name == "mps" and not torch.backends.mps.is_built():
        return " (torch is built without MPS, which is for macOS on Apple silicon)"
    return ""
