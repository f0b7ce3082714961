"""Selection strategies: which chunk tokens are recomputed. One strategy, one file, one class."""

from prophetkv_rag.reuse.selection.base import QueryContext, Selection, Strategy
from prophetkv_rag.reuse.selection.registry import available_strategies, make_strategy, register_strategy

__all__ = [
    "QueryContext",
    "Selection",
    "Strategy",
    "available_strategies",
    "make_strategy",
    "register_strategy",
]
