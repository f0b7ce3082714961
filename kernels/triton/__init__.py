"""The operations as Triton kernels, by the names and arguments of `reference/`.

Begin reading with `attention.py`; `logits.py` is what it shares with `scores.py`, `row_moves.py` what `gather.py` and
`scatter.py` share. `tiles.py` holds the sizes, `launch.py` what launchers have in common.
"""

from prophetkv_rag.kernels.triton.attention import log_sum_exp, selected_rows_attention
from prophetkv_rag.kernels.triton.gather import rope_gather
from prophetkv_rag.kernels.triton.launch import why_not
from prophetkv_rag.kernels.triton.scatter import rope_scatter, rotate
from prophetkv_rag.kernels.triton.scores import add_query_scores, attend_and_score

__all__ = [
    "add_query_scores",
    "attend_and_score",
    "log_sum_exp",
    "rope_gather",
    "rope_scatter",
    "rotate",
    "selected_rows_attention",
    "why_not",
]
