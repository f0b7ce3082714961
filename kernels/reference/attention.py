"""PyTorch: attention of scattered rows over the full cache, and its log-sum-exps.

Shapes: H query heads, Hkv key/value heads, G = H // Hkv, m computed rows, n keys, D head dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from prophetkv_rag.kernels.arguments import LogitInputs
from prophetkv_rag.kernels.reference.logits import block_weights, exact_logits, packed, unpacked, weighted
from prophetkv_rag.kernels.row_blocks import RowBlock


@cache
def _flash_cpu() -> Any:
    """Return SDPA's CPU kernel as SDPA calls it, or `None` where this torch has none of this form.

    Unlike the public function it also returns the log-sum-exp, with which two parts of a softmax are joined exactly. It
    is not documented, so it is tried on one number before it is relied on.
    """
    try:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        one = torch.ones(1, 1, 1, 8, dtype=torch.float32, device="cpu")
        output, lse = kernel(one, one, one, attn_mask=torch.zeros_like(one[0, 0, :, :1]), scale=1.0)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    return kernel if torch.equal(output, one) and abs(float(lse) - 8.0) < 1e-5 else None


def selected_rows_attention(
    inputs: LogitInputs, values: torch.Tensor, sinks: torch.Tensor | None = None, lse: torch.Tensor | None = None
) -> torch.Tensor:
    """Block by block; returns `[m, H, Dv]`."""
    if lse is not None:
        lse.copy_(log_sum_exp(inputs, sinks=sinks))
    output = inputs.query.new_empty(inputs.num_rows, inputs.heads, values.shape[-1])
    for block in inputs.blocks:
        if inputs.softcap is None and sinks is None:
            attended = _attend_block(inputs, values, block)
        else:
            attended = weighted(block_weights(inputs, block, sinks), values, block)
        output[block.rows] = unpacked(attended, inputs.heads)
    return output


def _attend_block(inputs: LogitInputs, values: torch.Tensor, block: RowBlock) -> torch.Tensor:
    """Attend from the block's rows to its keys; returns `[Hkv, G * rows, Dv]`."""
    keys, scaling = inputs.keys, inputs.scaling
    query = packed(inputs, block)[None]
    mask = block.mask.to(query.dtype)
    plain_keys, plain_values = keys[None, :, block.plain], values[None, :, block.plain]
    masked_keys, masked_values = keys[None, :, block.masked], values[None, :, block.masked]
    if plain_keys.shape[2] == 0:
        return F.scaled_dot_product_attention(query, masked_keys, masked_values, attn_mask=mask, scale=scaling)[0]
    flash = _flash_cpu()
    if flash is None or query.device.type != "cpu" or keys.shape[-1] != values.shape[-1]:
        padded = F.pad(mask, (plain_keys.shape[2], 0))
        span = block.keys
        return F.scaled_dot_product_attention(
            query, keys[None, :, span], values[None, :, span], attn_mask=padded, scale=scaling
        )[0]
    # Two calls, so that most keys are read without a mask beside them; then joined: with the log-sum-exps a and b of
    # the two parts, the softmax over both gives the first the weight e^a / (e^a + e^b).
    plain, plain_lse = flash(query, plain_keys, plain_values, scale=scaling)
    masked, masked_lse = flash(query, masked_keys, masked_values, attn_mask=mask, scale=scaling)
    share = torch.sigmoid(plain_lse - masked_lse)[..., None].to(plain.dtype)
    joined: torch.Tensor = torch.lerp(masked, plain, share)
    return joined[0]


def log_sum_exp(
    inputs: LogitInputs, context: torch.Tensor | None = None, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Block by block; returns `[H, m]` in fp32."""
    lse = inputs.query.new_empty(inputs.query.shape[:2], dtype=torch.float32)
    for block in inputs.blocks:
        of_block = torch.logsumexp(exact_logits(inputs, block, context), dim=-1)
        lse[:, block.rows] = of_block.reshape(inputs.heads, -1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.float()[:, None])
