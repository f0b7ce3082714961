"""The tensor operations of the reuse path, and the one place where an implementation is picked.

Every operation has a PyTorch implementation in `reference.py`, which is also the CPU path. There are no GPU kernels
yet: a CUDA tensor takes the same PyTorch code.
"""

from prophetkv_rag.kernels.reference import attend_and_score, rotate, selected_rows_attention
from prophetkv_rag.kernels.row_blocks import RowBlocks

__all__ = ["RowBlocks", "attend_and_score", "rotate", "selected_rows_attention"]
