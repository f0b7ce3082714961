"""The Triton implementations under the names and signatures of the PyTorch ones, and what they cannot take."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from prophetkv_rag.kernels.query_scores import add_query_scores, log_sum_exp
from prophetkv_rag.kernels.rope_gather import rope_gather
from prophetkv_rag.kernels.rope_scatter import rope_scatter, rotate
from prophetkv_rag.kernels.row_blocks import RowBlocks
from prophetkv_rag.kernels.sparse_attention import selected_rows_attention
from prophetkv_rag.kernels.tiles import MAX_HEAD_DIM, target_of

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

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(tensors: Iterable[torch.Tensor]) -> str | None:
    """Say why the kernels cannot take these queries, keys and values (one dtype); `None` if they can."""
    dtype = None
    for tensor in tensors:
        if tensor.shape[-1] > MAX_HEAD_DIM:
            return f"head dim {tensor.shape[-1]} is above {MAX_HEAD_DIM}"
        if tensor.dtype not in _DTYPES:
            return f"{tensor.dtype} is not fp32, fp16 or bf16"
        if dtype is not None and tensor.dtype != dtype:
            return f"{dtype} and {tensor.dtype} are mixed"
        if tensor.stride(-1) != 1:
            return f"channels do not lie side by side (strides {tensor.stride()})"
        if tensor.device.type == "cuda" and target_of(tensor.device) is None:
            return "the GPU is older than compute capability 8.0"
        dtype = tensor.dtype
    return None


def attend_and_score(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: RowBlocks,
    *,
    mass: torch.Tensor,
    context: torch.Tensor,
    scoring_rows: torch.Tensor,
    context_softmax: bool,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.attend_and_score`: three launches, no `[H, m, n]` tensor, nothing waits for the device."""
    heads, num_rows, _ = query.shape
    lse = query.new_empty(heads, num_rows, dtype=torch.float32)
    given = None if context_softmax else lse
    output = selected_rows_attention(
        query, keys, values, blocks, scaling=scaling, softcap=softcap, sinks=sinks, lse=given
    )
    if context_softmax:
        lse = log_sum_exp(query, keys, blocks, scaling=scaling, softcap=softcap, context=context)
    # A row that does not ask, or sees nothing of the context, has no say.
    lse.masked_fill_(lse.isneginf() | ~scoring_rows, float("inf"))
    add_query_scores(mass, query, keys, lse, blocks, scaling=scaling, softcap=softcap, context=context)
    return output
