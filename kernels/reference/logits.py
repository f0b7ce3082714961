"""One block of rows in PyTorch: its logits and weights; a group's heads become rows, so K and V are never repeated."""

from __future__ import annotations

import torch

from prophetkv_rag.kernels.arguments import LogitInputs
from prophetkv_rag.kernels.row_blocks import RowBlock


def packed(inputs: LogitInputs, block: RowBlock) -> torch.Tensor:
    """`[H, m, D]` -> `[Hkv, G * rows, D]`."""
    return inputs.query[:, block.rows].reshape(inputs.kv_heads, -1, inputs.dim)


def unpacked(attended: torch.Tensor, heads: int) -> torch.Tensor:
    """`[Hkv, G * rows, Dv]` -> `[rows, H, Dv]`."""
    return attended.reshape(heads, -1, attended.shape[-1]).transpose(0, 1)


def exact_logits(inputs: LogitInputs, block: RowBlock, context: torch.Tensor | None) -> torch.Tensor:
    """`[Hkv, G * rows, keys of the block]`, multiplied in fp32; -inf for what a row may not see or is no context."""
    keys = inputs.keys[:, block.keys]
    logits = _logits(packed(inputs, block).float(), keys.float(), inputs, block)
    return logits if context is None else logits.masked_fill_(~context[block.keys], float("-inf"))


def block_weights(inputs: LogitInputs, block: RowBlock, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax of `[Hkv, G * rows, keys of the block]` in fp32, multiplied in the model's dtype; `sinks [H]` join it."""
    logits = _logits(packed(inputs, block), inputs.keys[:, block.keys], inputs, block)
    if sinks is None:
        return torch.softmax(logits, dim=-1)
    num_rows = block.rows.stop - block.rows.start
    per_row = sinks.reshape(inputs.kv_heads, -1, 1).expand(-1, -1, num_rows).reshape(inputs.kv_heads, -1, 1)
    joined = torch.cat([logits, per_row.float()], dim=-1)
    return torch.softmax(joined, dim=-1)[..., :-1]


def weighted(weights: torch.Tensor, values: torch.Tensor, block: RowBlock) -> torch.Tensor:
    """What a block attends to, `[Hkv, G * rows, Dv]`, by its weights."""
    return torch.matmul(weights.to(values.dtype), values[:, block.keys])


def _logits(query: torch.Tensor, keys: torch.Tensor, inputs: LogitInputs, block: RowBlock) -> torch.Tensor:
    logits = torch.matmul(query, keys.transpose(1, 2)).float().mul_(inputs.scaling)
    if inputs.softcap is not None:
        logits = torch.tanh(logits.div_(inputs.softcap)).mul_(inputs.softcap)
    # The mask belongs to the last keys.
    logits[..., logits.shape[-1] - block.mask.shape[-1] :] += block.mask
    return logits
