"""The operations in PyTorch: the CPU path, and what the Triton kernels are held to.

Begin reading with `attention.py`; `logits.py` is what it shares with `scores.py`, `rows.py` is what moves rows.
"""

from prophetkv_rag.kernels.reference.attention import log_sum_exp, selected_rows_attention
from prophetkv_rag.kernels.reference.rows import rope_gather, rope_scatter, rotate
from prophetkv_rag.kernels.reference.scores import add_query_scores, attend_and_score

__all__ = [
    "add_query_scores",
    "attend_and_score",
    "log_sum_exp",
    "rope_gather",
    "rope_scatter",
    "rotate",
    "selected_rows_attention",
]
