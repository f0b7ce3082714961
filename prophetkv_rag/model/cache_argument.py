"""The name by which a model's forward takes its cache: `past_key_values`, and `cache` from transformers 5.24 on.

5.24 deprecates the old name, 5.40 takes it away; this is the one place that knows both. The model that is called is
asked first, since code that comes with a checkpoint may be older than the transformers it runs in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers.masking_utils import create_causal_mask

_NAMES = ("cache", "past_key_values")  # the newer one first: one that is only renamed may still accept the older


def _name_in(function: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(function).parameters
    return next((name for name in _NAMES if name in parameters), None)


CACHE_NAME = _name_in(create_causal_mask) or _NAMES[0]
"""The name that the installed transformers uses, in `generate` too."""


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return the cache as the keyword argument that `model(...)` takes it by.

    Args:
        model: What is called: a model, or its backbone. Wrappers that hand on whatever they are given say nothing
            about names; the installed transformers' is taken for them.
        cache: A transformers cache.
    """
    return {_name_in(getattr(model, "forward", model)) or CACHE_NAME: cache}
