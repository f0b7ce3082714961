"""Noticing that a model is no longer what its caches were made of: weights, adapters, training mode."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from prophetkv_rag.errors import ModelChangedError


class ModelState:
    """What a model was when its engine was made, cheap enough to be compared at every call.

    Weights are compared by what torch counts of them, not by their numbers: which tensors they are, how often each was
    written in place, their dtype and device. A write that torch does not count (through `.data`) is not noticed.
    """

    def __init__(self, model: Any) -> None:
        """Take note of a model as it is now."""
        self._model = model
        modules = list(model.modules())
        self._adapted = [module for module in modules if _has_adapters(module)]
        self._adapters = [_adapters(module) for module in self._adapted]
        self._weights = [(weakref.ref(tensor), *_counted(tensor)) for tensor in _tensors(modules)]

    def check(self) -> None:
        """Do nothing if the model is as it was; the caller holds `model_lock`.

        Raises:
            ModelChangedError: If it is not; the message says what changed.
        """
        modules = list(self._model.modules())
        adapters = [_adapters(module) for module in modules if _has_adapters(module)]
        self._must_have_adapters(adapters)
        _must(not any(module.training for module in modules), "it is in training mode (model.eval() ends that)")
        _must(self._has_same_weights(list(_tensors(modules))), "its weights were changed, replaced or moved")

    def check_adapters(self) -> None:
        """As `check`, for every token of an answer: only whether the adapters act as they did.

        Raises:
            ModelChangedError: If they do not.
        """
        self._must_have_adapters([_adapters(module) for module in self._adapted])

    def _must_have_adapters(self, adapters: list[_Adapters]) -> None:
        if adapters != self._adapters:
            _must(is_same=False, what=f"its adapters are {_told(adapters)} now and were {_told(self._adapters)}")

    def _has_same_weights(self, now: list[torch.Tensor]) -> bool:
        return len(now) == len(self._weights) and all(
            before[0]() is tensor and before[1:] == _counted(tensor)
            for tensor, before in zip(now, self._weights, strict=True)
        )


class _Adapters(NamedTuple):
    """How one layer's adapters act, as `peft`'s layers say it."""

    is_disabled: bool
    active: tuple[str, ...]
    merged: tuple[str, ...]
    strengths: tuple[tuple[str, float], ...]


def _must(is_same: bool, what: str) -> None:
    if not is_same:
        msg = (
            f"the model has changed since this engine was made: {what}. Caches made before are not this model's; "
            "put it back as it was, or make a new ProphetKVEngine, which finds or makes those of the model as it is"
        )
        raise ModelChangedError(msg)


def _tensors(modules: Iterable[torch.nn.Module]) -> Iterator[torch.Tensor]:
    """All weights: parameters, and buffers that are saved with them (the others are working memory)."""
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def _counted(tensor: torch.Tensor) -> tuple[int, torch.dtype, torch.device]:
    # An inference tensor's writes are not counted.
    return -1 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device


def _has_adapters(module: torch.nn.Module) -> bool:
    return isinstance(getattr(type(module), "disable_adapters", None), (bool, property))


def _adapters(module: Any) -> _Adapters:
    scaling = getattr(module, "scaling", None) or {}
    return _Adapters(
        bool(module.disable_adapters),
        _names(getattr(module, "active_adapters", ())),
        _names(getattr(module, "merged_adapters", ())),
        tuple(sorted((str(name), float(value)) for name, value in scaling.items())),
    )


def _names(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(map(str, names or ()))


def _told(adapters: list[_Adapters]) -> str:
    kinds = {
        "switched off" if layer.is_disabled else (", ".join(layer.active) or "none") + " (merged)" * bool(layer.merged)
        for layer in adapters
    }
    return " / ".join(sorted(kinds)) or "none"
