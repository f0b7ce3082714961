"""Which settings a store on disk takes."""

from __future__ import annotations

from typing import get_args

from prophetkv_rag.errors import InputError
from prophetkv_rag.store import Policy
from prophetkv_rag.store.catalog import Eviction


def check_settings(policy: str, eviction: str, max_bytes: int | None, **limits: int | None) -> None:
    """Raise `InputError` for a setting that is not allowed."""
    for name, value, allowed in (("policy", policy, get_args(Policy)), ("eviction", eviction, get_args(Eviction))):
        if value not in allowed:
            msg = f"{name} is {value!r}; allowed: {', '.join(allowed)}"
            raise InputError(msg)
    for name, limit in {"max_bytes": max_bytes, **limits}.items():
        if limit is not None and limit < 0:
            msg = f"{name} is {limit}; give 0 or more bytes, or None for no limit"
            raise InputError(msg)
