"""Taking a weight apart into plain tensors and words, however it is packed, so that it can be told from another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

import torch

from prophetkv_rag.errors import UnsupportedModelError

Part = tuple[str, "torch.Tensor | str"]

_PLAIN_VALUES = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.Size, torch.layout, torch.device)


def parts_of(name: str, value: Any) -> Iterator[Part]:
    """Yield (name, plain strided tensor or text) of everything that a value of a `state_dict` holds.

    A plain tensor is its own only part. torch's quantised tensors are their integers, scales and zero points; tensor
    subclasses (torchao, quanto) what their own `__tensor_flatten__` says; tuples and dictionaries their entries.

    Raises:
        UnsupportedModelError: For a weight that is not in memory, and for one that cannot be looked into.
    """
    if isinstance(value, torch.Tensor):
        yield from _tensor_parts(name, value)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from parts_of(f"{name}.{index}", item)
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from parts_of(f"{name}.{key}", value[key])
    elif isinstance(value, _PLAIN_VALUES):
        yield name, f"{type(value).__name__} {value!s}"
    elif isinstance(value, Enum) or is_dataclass(value):  # settings of a packing
        yield name, f"{type(value).__qualname__} {_settings(value)}"
    else:
        raise _opaque(name, value)


def _tensor_parts(name: str, tensor: torch.Tensor) -> Iterator[Part]:
    tensor = tensor.detach()
    if tensor.is_meta:
        msg = (
            f"its weight {name} is not in memory (device meta): it is offloaded, or was never loaded; load the model "
            "whole, without an offloading device_map"
        )
        raise UnsupportedModelError(msg)
    if hasattr(tensor, "__tensor_flatten__"):
        inner, context = tensor.__tensor_flatten__()
        yield name, f"{type(tensor).__qualname__} {tuple(tensor.shape)} {tensor.dtype} {_settings(context)}"
        for attribute in inner:
            yield from parts_of(f"{name}.{attribute}", getattr(tensor, attribute))
    elif tensor.is_quantized:
        yield name, f"{tensor.qscheme()} {tensor.dtype}"
        yield f"{name}.int", tensor.int_repr()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield f"{name}.scale", f"{tensor.q_scale()} {tensor.q_zero_point()}"
        else:
            yield f"{name}.scales", tensor.q_per_channel_scales()
            yield f"{name}.zeros", tensor.q_per_channel_zero_points()
    elif tensor.layout is not torch.strided:
        sparse = (tensor if tensor.layout is torch.sparse_coo else tensor.to_sparse()).coalesce()
        yield f"{name}.shape", str(tuple(tensor.shape))
        yield f"{name}.indices", sparse.indices()
        yield f"{name}.values", sparse.values()
    else:
        try:
            tensor.untyped_storage().data_ptr()
        except RuntimeError:  # a subclass without memory of its own that does not say what it holds
            raise _opaque(name, tensor) from None
        yield name, torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _settings(value: Any) -> str:
    """Return settings as text without addresses of objects."""
    if isinstance(value, dict):
        return str({str(key): _settings(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))})
    if isinstance(value, (tuple, list)):
        return str([_settings(item) for item in value])
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, type) or callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, _PLAIN_VALUES):
        return str(value)
    slots = getattr(value, "__dict__", None)
    return f"{type(value).__qualname__} {_settings(slots)}" if slots else type(value).__qualname__


def _opaque(name: str, value: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"its weight {name} is a {type(value).__module__}.{type(value).__qualname__}, which does not tell what it "
        "holds, so caches of this model could not be told from another's"
    )
