"""Triton's interpreter made fit for tests: bf16 as a GPU computes it, and a sanitizer for memory.

Import it in a process where TRITON_INTERPRET=1 was set before Triton was loaded. As shipped (3.7.1) the interpreter
keeps bf16 as 16-bit integers and computes with those, without a word; it truncates where a GPU rounds; it reads 0 where
a masked load names no other value, and it reads and writes anywhere. It runs programs one after another, so races
between programs leave no trace in the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, interpreter_builder

_PATCHED = (
    "binary_op", "cast_impl", "create_dot", "create_fp_to_fp", "create_masked_load", "create_masked_store", "unary_op",
)  # fmt: skip
_shipped = {name: getattr(InterpreterBuilder, name) for name in _PATCHED}


class MemoryFault(Exception):
    """A kernel touched what is not its own. (The interpreter wraps it in its own error.)"""


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> np.ndarray:
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if _is_bf16(handle) else handle.data


def _rounded(data: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def _cast(self: Any, src: TensorHandle, dst_type: Any, *rounding: Any, name: str) -> TensorHandle:
    if dst_type.scalar == tl.bfloat16 and not _is_bf16(src):
        return TensorHandle(_rounded(src.data.astype(np.float32)), tl.bfloat16)
    if _is_bf16(src):
        wide = TensorHandle(_widened(src), tl.float32)
        return wide if dst_type.scalar == tl.float32 else _shipped["cast_impl"](self, wide, dst_type)
    return _shipped[name](self, src, dst_type, *rounding)


def _dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
    a, b = (TensorHandle(_widened(x), tl.float32) if _is_bf16(x) else x for x in (a, b))
    return _shipped["create_dot"](self, a, b, d, *rest)


def _arithmetic(name: str) -> Any:
    def checked(self: Any, first: TensorHandle, *rest: Any) -> TensorHandle:
        if _is_bf16(first):
            msg = "arithmetic on bf16: convert to fp32 first"
            raise TypeError(msg)
        return _shipped[name](self, first, *rest)

    return checked


def _load(self: Any, ptrs: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *rest: Any) -> TensorHandle:
    if other is None and not mask.data.all():  # undefined on a GPU
        dtype = ptrs.get_element_ty()
        undefined = {2: 0x7FFF, 4: 0x7FFFFFFF}.get(dtype.primitive_bitwidth // 8, 0x7F)
        bits = np.full(ptrs.data.shape, undefined, dtype=f"uint{max(8, dtype.primitive_bitwidth)}")
        loaded = _shipped["create_masked_load"](self, ptrs, mask, other, *rest)
        keep = np.broadcast_to(mask.data, loaded.data.shape)
        return TensorHandle(np.where(keep, loaded.data, bits.view(loaded.data.dtype)), loaded.dtype)
    return _shipped["create_masked_load"](self, ptrs, mask, other, *rest)


def repair() -> None:
    """Patch the interpreter, for the rest of the process."""
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.cast_impl = lambda self, src, dst_type: _cast(self, src, dst_type, name="cast_impl")
    InterpreterBuilder.create_fp_to_fp = lambda self, src, dst_type, rounding: _cast(
        self, src, dst_type, rounding, name="create_fp_to_fp"
    )
    InterpreterBuilder.binary_op = _arithmetic("binary_op")
    InterpreterBuilder.unary_op = _arithmetic("unary_op")
    InterpreterBuilder.create_masked_load = _load


class _Launch:
    """The memory that one launch may touch, and which program read and wrote each byte."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        ranges = sorted(_extent(tensor) for tensor in tensors if tensor.numel())
        merged: list[list[int]] = []
        for start, stop in ranges:
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], stop)
            else:
                merged.append([start, stop])
        self.starts = np.array([start for start, _ in merged], dtype=np.int64)
        self.stops = np.array([stop for _, stop in merged], dtype=np.int64)
        sizes = self.stops - self.starts
        self.offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.writer = np.full(int(sizes.sum()), -1, dtype=np.int64)
        self.reader = self.writer.copy()

    def places(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        addresses = addresses.astype(np.int64)
        region = np.searchsorted(self.starts, addresses, side="right") - 1
        is_outside = (region < 0) | (addresses + size > self.stops[region])
        if is_outside.any():
            msg = f"{what} outside every tensor: {int(is_outside.sum())} of {addresses.size} lanes"
            raise MemoryFault(msg)
        return self.offsets[region] + addresses - self.starts[region]

    def read(self, places: np.ndarray, size: int, program: int) -> None:
        for byte in range(size):
            owner = self.writer[places + byte]
            if ((owner >= 0) & (owner != program)).any():
                raise MemoryFault("a program reads what another one writes")
            seen = self.reader[places + byte]
            self.reader[places + byte] = np.where((seen == -1) | (seen == program), program, -2)

    def write(self, places: np.ndarray, size: int, program: int) -> None:
        if np.unique(places).size != places.size:
            raise MemoryFault("one store writes an address twice")
        for byte in range(size):
            owner, seen = self.writer[places + byte], self.reader[places + byte]
            if ((owner >= 0) & (owner != program)).any():
                raise MemoryFault("two programs write one address")
            if ((seen != -1) & (seen != program)).any():
                raise MemoryFault("a program writes what another one has read")
            self.writer[places + byte] = program


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and last + 1, of the elements of a view (not of its storage)."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


@contextmanager
def sanitizer(*reachable: torch.Tensor) -> Iterator[None]:
    """Check every load and store inside the block; what kernels reach by address alone is named in `reachable`."""
    launch: list[_Launch] = []
    run, load, store = GridExecutor.__call__, InterpreterBuilder.create_masked_load, _shipped["create_masked_store"]

    def checked_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
        launch[:] = [_Launch([*tensors, *reachable])]
        return run(self, *args, **kwargs)

    def lanes(ptrs: TensorHandle, mask: TensorHandle, what: str) -> tuple[np.ndarray, int, int]:
        active = np.broadcast_to(ptrs.data, np.broadcast_shapes(ptrs.data.shape, mask.data.shape))
        active = active[np.broadcast_to(mask.data, active.shape)].ravel()
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        x, y, z = interpreter_builder.grid_idx
        program = (x * interpreter_builder.grid_dim[1] + y) * interpreter_builder.grid_dim[2] + z
        return launch[0].places(active, size, what), size, program

    def checked_load(self: Any, ptrs: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        launch[0].read(*lanes(ptrs, mask, "load"))
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        launch[0].write(*lanes(ptrs, mask, "store"))
        return store(self, ptrs, value, mask, *rest)

    GridExecutor.__call__ = checked_run
    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    try:
        yield
    finally:
        GridExecutor.__call__, InterpreterBuilder.create_masked_load = run, load
        InterpreterBuilder.create_masked_store = store
