"""Selection strategies: which chunk tokens are recomputed. One strategy, one file, one class.

In comes a `QueryContext` (what a strategy sees of one query, `stage_one.py`); out goes a `Selection`. Begin reading
with `base.py` and `prophetkv.py`; `registry.py` knows them by name.
"""

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
