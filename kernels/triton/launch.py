"""What the Triton launchers have in common: what they refuse, and the arguments that several kernels take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from prophetkv_rag.kernels.arguments import Angles, LogitInputs
from prophetkv_rag.kernels.triton.tiles import MAX_HEAD_DIM, ROW_TILE, Tile, padded, padded_head, row_warps, target_of

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


def must_be_dense(**tensors: torch.Tensor | None) -> None:
    """Raise `ValueError` for a tensor that the kernels, which know no strides of it, would read or write wrongly."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            msg = f"{name} must be contiguous; it is {list(tensor.shape)} with strides {list(tensor.stride())}"
            raise ValueError(msg)


def dot_precision(dtype: torch.dtype) -> str:
    """`ieee` for fp32, unless the user allowed TF32 (`torch.set_float32_matmul_precision`); NVIDIA only."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def logit_arguments(inputs: LogitInputs, hidden: torch.Tensor | None, tile: Tile) -> dict[str, Any]:
    """Of the kernels of `attention.py` and `scores.py`: queries, keys, which are seen, and how a program is run."""
    last_keys, first_keys = inputs.blocks.last_keys, inputs.blocks.first_keys
    must_be_dense(rows=last_keys, hidden_keys=hidden)
    query, keys = inputs.query, inputs.keys
    return {
        "query_ptr": query, "key_ptr": keys, "last_ptr": last_keys,
        "first_ptr": last_keys if first_keys is None else first_keys,
        "hidden_ptr": query if hidden is None else hidden.view(torch.uint8),
        "query_stride_head": query.stride(0), "query_stride_row": query.stride(1),
        "key_stride_head": keys.stride(0), "key_stride_row": keys.stride(1),
        "num_rows": inputs.num_rows, "num_keys": inputs.num_keys,
        "scaling": float(inputs.scaling), "softcap": float(inputs.softcap or 1.0),
        "GROUPS": inputs.heads // inputs.kv_heads,
        "HAS_WINDOW": first_keys is not None, "HAS_HIDDEN": hidden is not None,
        "HAS_SOFTCAP": inputs.softcap is not None, "PRECISION": dot_precision(query.dtype),
        "DIM": inputs.dim, "BLOCK_DIM": padded_head(inputs.dim),
        "BLOCK_ROWS": tile.block_rows, "BLOCK_KEYS": tile.block_keys,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def row_arguments(dim: int, value_dim: int, angles: Angles | None, instead: torch.Tensor) -> dict[str, Any]:
    """Of the kernels of `gather.py` and `scatter.py`: sizes and angles; where there are none, `instead` is not read."""
    half = 0 if angles is None else angles.cos.shape[-1]
    return {
        "cos_ptr": instead if angles is None else angles.cos.contiguous(),
        "sin_ptr": instead if angles is None else angles.sin.contiguous(),
        "DIM": dim, "VALUE_DIM": value_dim, "HALF": half, "BLOCK_HALF": padded(half),
        "BLOCK_REST": padded(dim - 2 * half), "BLOCK_VALUE": padded(value_dim),
        "INTERLEAVED": angles is not None and angles.interleaved, "TILE": ROW_TILE,
        "num_warps": row_warps(max(dim, value_dim)),
    }  # fmt: skip
