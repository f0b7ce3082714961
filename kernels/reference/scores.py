"""PyTorch: the attention mass that each key receives, with attention or from rows' log-sum-exps."""

from __future__ import annotations

import torch

from prophetkv_rag.kernels.arguments import LogitInputs, Scoring
from prophetkv_rag.kernels.reference.logits import block_weights, exact_logits, unpacked, weighted


def attend_and_score(
    inputs: LogitInputs, values: torch.Tensor, sinks: torch.Tensor | None, scoring: Scoring
) -> torch.Tensor:
    """Block by block, from the weights that attention has at hand; returns `[m, H, Dv]`."""
    output = inputs.query.new_empty(inputs.num_rows, inputs.heads, values.shape[-1])
    context_columns = scoring.context.float()
    for block in inputs.blocks:
        rows, span = block.rows, block.keys
        weights = block_weights(inputs, block, sinks)
        output[rows] = unpacked(weighted(weights, values, block), inputs.heads)

        # Softmax over the context alone = the full row's weights divided by their context part. A row that sees no
        # context (a sliding window past it) has no say: its part is 0 and stays 0.
        weight_of_row = scoring.scoring_rows[rows].float().repeat(inputs.heads).reshape(inputs.kv_heads, 1, -1)
        if scoring.context_softmax:
            context_part = torch.matmul(weights, context_columns[span]).unsqueeze(1)
            weight_of_row = weight_of_row / context_part.clamp_min(torch.finfo(torch.float32).tiny)
        scoring.mass[:, span].addcmul_(torch.matmul(weight_of_row, weights)[:, 0], context_columns[span])
    return output


def add_query_scores(
    inputs: LogitInputs, mass: torch.Tensor, lse: torch.Tensor, context: torch.Tensor | None = None
) -> None:
    """Block by block."""
    for block in inputs.blocks:
        logits = exact_logits(inputs, block, context)
        of_rows = lse[:, block.rows].reshape(inputs.kv_heads, -1, 1)
        mass[:, block.keys] += torch.exp(logits - of_rows).sum(1)
