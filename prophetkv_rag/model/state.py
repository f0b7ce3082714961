"""Noticing that a model is no longer what its caches were made of: weights, adapters, training mode."""

from __future__ import annotations

import weakref
from typing import Any

from prophetkv_rag.errors import ModelChangedError

Weight = tuple["weakref.ref[Any]", int, str]


class ModelState:
    """What a model was when its engine was made, cheap enough to be compared at every call.

    Weights are compared by what torch counts of them, not by their numbers: which tensors they are, how often each was
    written in place, their dtype and device. A write that torch does not count (through `.data`) is not noticed.
    """

    def __init__(self, model: Any) -> None:
        """Take note of a model as it is now."""
        self._model = model
        self._adapters = _adapters(model)
        self._weights = _weights(model)

    def check(self) -> None:
        """Do nothing if the model is as it was; the caller holds `model_lock`.

        Raises:
            ModelChangedError: If it is not; the message says what changed.
        """
        what = self._change()
        if what:
            msg = (
                f"the model has changed since this engine was made: {what}. Caches made before are not this model's; "
                "put it back as it was, or make a new ProphetKVEngine, which finds or makes those of the model as it is"
            )
            raise ModelChangedError(msg)

    def _change(self) -> str | None:
        if any(module.training for module in self._model.modules()):
            return "it is in training mode (model.eval() ends that)"
        adapters = _adapters(self._model)
        if adapters != self._adapters:
            return f"its adapters are {_told(adapters)} now and were {_told(self._adapters)}"
        return None if self._has_same_weights() else "its weights were changed, replaced or moved"

    def _has_same_weights(self) -> bool:
        now = list(_tensors(self._model))
        return len(now) == len(self._weights) and all(
            before() is tensor and version == _version(tensor) and kind == _kind(tensor)
            for tensor, (before, version, kind) in zip(now, self._weights, strict=True)
        )


def _tensors(model: Any) -> Any:
    """All weights: parameters, and buffers that are saved with them (the others are working memory)."""
    for module in model.modules():
        yield from (tensor for tensor in module._parameters.values() if tensor is not None)
        for name, tensor in module._buffers.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield tensor


def _weights(model: Any) -> list[Weight]:
    return [(weakref.ref(tensor), _version(tensor), _kind(tensor)) for tensor in _tensors(model)]


def _version(tensor: Any) -> int:
    return -1 if tensor.is_inference() else int(tensor._version)  # an inference tensor's writes are not counted


def _kind(tensor: Any) -> str:
    return f"{tensor.dtype} {tensor.device}"


def _adapters(model: Any) -> list[tuple[Any, ...]]:
    """Return (disabled, active, merged, strengths) of every layer with adapters, as `peft`'s layers say it."""
    return [
        (
            bool(module.disable_adapters),
            _names(getattr(module, "active_adapters", ())),
            _names(getattr(module, "merged_adapters", ())),
            tuple(
                sorted((str(name), float(value)) for name, value in (getattr(module, "scaling", None) or {}).items())
            ),
        )
        for module in model.modules()
        if isinstance(getattr(type(module), "disable_adapters", None), (bool, property))
    ]


def _names(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(map(str, names or ()))


def _told(adapters: list[tuple[Any, ...]]) -> str:
    kinds = sorted(
        {
            "switched off" if disabled else f"{', '.join(active) or 'none'}{' (merged)' if merged else ''}"
            for disabled, active, merged, _ in adapters
        }
    )
    return " / ".join(kinds) or "none"
