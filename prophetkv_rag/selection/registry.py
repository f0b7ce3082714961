"""Strategies by name. Applications may register their own."""

from __future__ import annotations

from prophetkv_rag.errors import InputError
from prophetkv_rag.selection.base import Strategy
from prophetkv_rag.selection.full_prefill import FullPrefill
from prophetkv_rag.selection.full_reuse import FullReuse
from prophetkv_rag.selection.prophetkv import ProphetKV
from prophetkv_rag.selection.random_tokens import RandomTokens

_STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (FullPrefill, FullReuse, ProphetKV, RandomTokens)
}


def available_strategies() -> tuple[str, ...]:
    """Return the names that `ProphetKVConfig.strategy` and `strategy=` accept."""
    return tuple(_STRATEGIES)


def register_strategy(strategy: type[Strategy]) -> type[Strategy]:
    """Make a strategy available under its `name`; usable as a class decorator."""
    _STRATEGIES[strategy.name] = strategy
    return strategy


def make_strategy(name: str) -> Strategy:
    """Return a strategy by name.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in _STRATEGIES:
        msg = f"unknown strategy {name!r}; allowed: {', '.join(_STRATEGIES)}"
        raise InputError(msg)
    return _STRATEGIES[name]()
