"""How a prompt's passes reach the model: it has the model for itself, or shares forwards with other prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from prophetkv_rag.generation import InterruptibleLock, SharedPasses
from prophetkv_rag.model import Runner, TransformersRunner
from prophetkv_rag.reuse.selection import Strategy


@contextmanager
def passes(
    model: Any, model_lock: AbstractContextManager[Any], check: Callable[[], None], strategy: Strategy
) -> Iterator[Runner]:
    """Give a prompt a runner for its passes, which is good inside the block.

    Args:
        model: The language model.
        model_lock: Held for the whole block, unless passes are shared.
        check: Called once under it; raises if the model must not run.
        strategy: Its passes are shared only if it puts nothing between the model's layers.
    """
    turns = model_lock.turns if isinstance(model_lock, InterruptibleLock) and strategy.shares_passes else None
    if turns is None or not turns.shares_passes or turns.is_held_here:
        with model_lock:
            check()
            yield TransformersRunner(model)
        return
    assert isinstance(model_lock, InterruptibleLock)
    with model_lock:
        check()
        turns.admit(model_lock)
    try:
        yield SharedPasses(model, model_lock)
    finally:
        turns.prefilled(model_lock)
