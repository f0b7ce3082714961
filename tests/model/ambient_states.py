"""What callers set around our calls, one by one; each is put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def everything() -> Iterator[None]:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), default_device("meta"):
        yield


STATES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "autocast_bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast_fp16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default_dtype_float64": lambda: default_dtype(torch.float64),
    "default_dtype_bfloat16": lambda: default_dtype(torch.bfloat16),
    "set_default_device_meta": lambda: default_device("meta"),
    "with_device_meta": lambda: torch.device("meta"),
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "deterministic_algorithms": deterministic,
    "everything_at_once": everything,
}
