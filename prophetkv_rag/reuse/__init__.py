"""Query time: from a laid-out prompt to a filled KV cache.

In come a `PromptLayout` and the chunks' caches; out comes a `PrefillResult`: a standard `past_key_values`, the last
token's logits and the report. Begin reading with `prefill.py`, which goes through the others in this order:
`assemble.py` (caches to their new positions), `stage_one.py` (what the question attends to), `selection/` (which tokens
are recomputed), `recompute.py` (those run again, in place), `accounting.py` (the report).
"""

from prophetkv_rag.reuse.assemble import Assembly, assemble_caches
from prophetkv_rag.reuse.loading import ratio_by_encoding
from prophetkv_rag.reuse.prefill import Prefiller, PrefillResult
from prophetkv_rag.reuse.pruning import LayerView
from prophetkv_rag.reuse.recompute import RowsJob, recompute_rows, rows_job
from prophetkv_rag.reuse.selection import (
    QueryContext,
    Selection,
    Strategy,
    available_strategies,
    make_strategy,
    register_strategy,
)
from prophetkv_rag.reuse.selection.base import token_budget, top_positions
from prophetkv_rag.reuse.stage_one import ask_together

__all__ = [
    "Assembly",
    "LayerView",
    "PrefillResult",
    "Prefiller",
    "QueryContext",
    "RowsJob",
    "Selection",
    "Strategy",
    "ask_together",
    "assemble_caches",
    "available_strategies",
    "make_strategy",
    "ratio_by_encoding",
    "recompute_rows",
    "register_strategy",
    "rows_job",
    "token_budget",
    "top_positions",
]
