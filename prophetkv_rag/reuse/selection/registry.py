"""Strategies by name. Applications may register their own."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.reuse.selection.base import Strategy
from prophetkv_rag.reuse.selection.cacheblend import CacheBlend
from prophetkv_rag.reuse.selection.epic import Epic
from prophetkv_rag.reuse.selection.full_prefill import FullPrefill
from prophetkv_rag.reuse.selection.full_reuse import FullReuse
from prophetkv_rag.reuse.selection.fusionrag import FusionRAG
from prophetkv_rag.reuse.selection.infoflow import InfoFlow
from prophetkv_rag.reuse.selection.kvshare import KVShare
from prophetkv_rag.reuse.selection.prophetkv import ProphetKV
from prophetkv_rag.reuse.selection.prophetkv_late import ProphetKVLate
from prophetkv_rag.reuse.selection.qcfuse import QCFuse
from prophetkv_rag.reuse.selection.random_tokens import RandomTokens

_STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        ProphetKV,
        ProphetKVLate,
        CacheBlend,
        Epic,
        KVShare,
        InfoFlow,
        FusionRAG,
        QCFuse,
        RandomTokens,
        FullReuse,
        FullPrefill,
    )
}


def available_strategies() -> tuple[str, ...]:
    """Return the names that `ProphetKVConfig.strategy` and `strategy=` accept."""
    return tuple(_STRATEGIES)


def register_strategy(strategy: type[Strategy]) -> type[Strategy]:
    """Make a strategy available under its `name`; usable as a class decorator."""
    _STRATEGIES[strategy.name] = strategy
    return strategy


def make_strategy(spec: str) -> Strategy:
    """Return a strategy by name, with options where it has any.

    For example `"prophetkv"`, `"epic:k=16"`, `"cacheblend:deviation=k,filtering=gradual"`.

    Raises:
        InputError: If there is no strategy of that name, or an option is unknown or has a value that is not allowed.
    """
    name, _, options = spec.partition(":")
    if name not in _STRATEGIES:
        msg = f"unknown strategy {name!r}; allowed: {', '.join(_STRATEGIES)}"
        raise InputError(msg)
    strategy = _STRATEGIES[name]
    known: dict[str, Any] = {one.name: one for one in fields(strategy)} if is_dataclass(strategy) else {}
    values: dict[str, Any] = {}
    for part in filter(None, options.split(",")):
        option, _, text = part.partition("=")
        if option not in known:
            msg = f"strategy {name!r} has no option {option!r}; allowed: {', '.join(known) or 'none'}"
            raise InputError(msg)
        values[option] = _number_or_text(text)
    try:
        return strategy(**values)
    except (TypeError, ValueError) as error:
        msg = f"strategy {spec!r}: {error}"
        raise InputError(msg) from error


def _number_or_text(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
