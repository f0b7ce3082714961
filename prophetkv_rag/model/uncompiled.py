"""Running a compiled model as it was before `torch.compile`.

Our passes have other rows at every call and look at Python objects (the cache's layers, the running pass), so a
compiler would compile them anew again and again, or fail at the second length. A compiled part is therefore replaced
by what it was made of while a pass of ours runs. Calls of the caller's own run compiled as before; one that another
thread makes meanwhile runs uncompiled, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """Run a block with every module of the model as it was before it was compiled; the caller holds `model_lock`.

    Covers `torch.compile(module)`, `module.compile()` and a compiled `forward`, of an object or a class, for the model
    and for any of its parts.
    """
    undone: list[tuple[dict[str, Any], str, Any]] = []
    of_class: dict[type, Callable[..., Any] | None] = {}
    try:
        for module in _modules(model):
            own = vars(module)
            if own.get("_compiled_call_impl") is not None:
                _replace(own, "_compiled_call_impl", None, undone)
            if "forward" in own:
                original = _original(own["forward"])
                if original is not None:
                    _replace(own, "forward", original, undone)
                continue
            kind = type(module)
            if kind not in of_class:
                of_class[kind] = _original(kind.forward)
            method = of_class[kind]
            if method is not None:
                _replace(own, "forward", method.__get__(module), undone)
        yield
    finally:
        for own, name, value in reversed(undone):
            if value is _MISSING:
                own.pop(name, None)
            else:
                own[name] = value


_MISSING = object()


def _modules(model: Any) -> list[torch.nn.Module]:
    """Return the model and all its parts, in any order; `modules()` takes several times as long, for every token."""
    found: dict[int, torch.nn.Module] = {}
    left: list[torch.nn.Module | None] = [model] if isinstance(model, torch.nn.Module) else []
    while left:
        module = left.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            left.extend(module._modules.values())
    return list(found.values())


def _replace(own: dict[str, Any], name: str, value: Any, undone: list[tuple[dict[str, Any], str, Any]]) -> None:
    undone.append((own, name, own.get(name, _MISSING)))
    own[name] = value


def _original(function: Any) -> Callable[..., Any] | None:
    """Return what a compiled function was made of; `None` for a function that is not compiled."""
    found = function
    # A wrapper that copies its function's attributes (`functools.wraps`) is not itself compiled: it stays.
    while (inner := vars(found).get("_torchdynamo_orig_callable") if hasattr(found, "__dict__") else None) is not None:
        if getattr(found, "__wrapped__", None) is not inner:
            break
        found = inner
    return None if found is function else found
