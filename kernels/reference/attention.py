"""PyTorch implementations of the reuse path's operations; they are the CPU path and the kernels' reference.

Shapes: H query heads, Hkv key/value heads, G = H // Hkv, m computed rows, n keys, D head dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from prophetkv_rag.kernels.reference_scores import log_sum_exp
from prophetkv_rag.kernels.row_blocks import RowBlock, RowBlocks


@cache
def _flash_cpu() -> Any:
    """Return SDPA's CPU kernel as SDPA calls it, or `None` where this torch has none of this form.

    Unlike the public function it also returns the log-sum-exp, with which two parts of a softmax are joined exactly. It
    is not documented, so it is tried on one number before it is relied on.
    """
    try:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        one = torch.ones(1, 1, 1, 8)
        output, lse = kernel(one, one, one, attn_mask=torch.zeros(1, 1), scale=1.0)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    return kernel if torch.equal(output, one) and abs(float(lse) - 8.0) < 1e-5 else None


def rotate(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply a rotary embedding to un-rotated states.

    Args:
        states: `[..., n, D]`; fp16, bf16 or fp32.
        cos: `[n, r]` with 2r <= D, fp32; channels beyond 2r pass through.
        sin: `[n, r]`, fp32.
        interleaved: Pairs are (2i, 2i + 1) rather than (i, i + r).
        out: Where to write, of the shape of `states` and any dtype; not `states` itself.

    Returns:
        `out`, or a new tensor of the shape and dtype of `states`; the rotation is done in fp32.
    """
    half = cos.shape[-1]
    rotated = torch.empty_like(states) if out is None else out
    if interleaved:
        first, second = states[..., 0 : 2 * half : 2], states[..., 1 : 2 * half : 2]
        out_first, out_second = rotated[..., 0 : 2 * half : 2], rotated[..., 1 : 2 * half : 2]
    else:
        first, second = states[..., :half], states[..., half : 2 * half]
        out_first, out_second = rotated[..., :half], rotated[..., half : 2 * half]
    first32, second32 = first.float(), second.float()
    out_first.copy_(torch.addcmul(first32 * cos, second32, sin, value=-1))
    out_second.copy_(torch.addcmul(second32 * cos, first32, sin))
    if states.shape[-1] > 2 * half:
        rotated[..., 2 * half :] = states[..., 2 * half :]
    return rotated


def _probabilities(
    query: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax of `query [Hkv, G * m, D]` over `keys [Hkv, n, D]` in fp32; `sinks [Hkv, G * m, 1]` join it.

    `mask` belongs to the last keys.
    """
    logits = torch.matmul(query, keys.transpose(1, 2)).float().mul_(scaling)
    if softcap is not None:
        logits = torch.tanh(logits.div_(softcap)).mul_(softcap)
    logits[..., logits.shape[-1] - mask.shape[-1] :] += mask
    if sinks is None:
        return torch.softmax(logits, dim=-1)
    joined = torch.cat([logits, sinks.float()], dim=-1)
    return torch.softmax(joined, dim=-1)[..., :-1]


def _pack(query: torch.Tensor, rows: slice, num_key_value_heads: int) -> torch.Tensor:
    """`[H, m, D]` -> `[Hkv, G * rows, D]`: a group's heads become rows, so K and V are never repeated."""
    block = query[:, rows]
    return block.reshape(num_key_value_heads, -1, query.shape[-1])


def _pack_sinks(sinks: torch.Tensor | None, num_rows: int, num_key_value_heads: int) -> torch.Tensor | None:
    if sinks is None:
        return None
    per_row = sinks.reshape(num_key_value_heads, -1, 1).expand(-1, -1, num_rows)
    return per_row.reshape(num_key_value_heads, -1, 1)


def selected_rows_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: RowBlocks,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of scattered rows over the full cache, causal by position.

    Args:
        query: `[H, m, D]`, rotated, in the order of `blocks.rows`.
        keys: `[Hkv, n, D]`, rotated; key i stands at position i.
        values: `[Hkv, n, Dv]`.
        blocks: The rows' positions, window and hidden keys.
        scaling: Factor on the logits.
        softcap: Gemma 2's logit soft-capping, or `None`.
        sinks: `[H]`, gpt-oss's learned sink logits, or `None`.
        lse: `[H, m]`, fp32: filled with the natural log-sum-exp of what each row sees, sinks included; or `None`.

    Returns:
        `[m, H, Dv]` in the dtype of `query`.
    """
    if lse is not None:
        lse.copy_(log_sum_exp(query, keys, blocks, scaling=scaling, softcap=softcap, sinks=sinks))
    num_heads, num_rows, _ = query.shape
    num_kv_heads = keys.shape[0]
    output = query.new_empty(num_rows, num_heads, values.shape[-1])
    for block in blocks:
        packed = _pack(query, block.rows, num_kv_heads)
        if softcap is None and sinks is None:
            attended = _attend_block(packed, keys, values, block, scaling)
        else:
            num_block_rows = block.rows.stop - block.rows.start
            block_sinks = _pack_sinks(sinks, num_block_rows, num_kv_heads)
            weights = _probabilities(packed, keys[:, block.keys], block.mask, scaling, softcap, block_sinks)
            attended = torch.matmul(weights.to(values.dtype), values[:, block.keys])
        output[block.rows] = attended.reshape(num_heads, -1, values.shape[-1]).transpose(0, 1)
    return output


def _attend_block(
    packed: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block: RowBlock, scaling: float
) -> torch.Tensor:
    """Attend from `packed [Hkv, G * rows, D]` to the block's keys; returns `[Hkv, G * rows, Dv]`."""
    query, mask = packed[None], block.mask.to(packed.dtype)
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
    """Attention as `selected_rows_attention`, adding up the attention mass that each context key receives.

    Args:
        query: `[H, m, D]`.
        keys: `[Hkv, n, D]`.
        values: `[Hkv, n, Dv]`.
        blocks: The rows' positions, window and hidden keys.
        mass: `[Hkv, n]`, fp32: added to, so that layers may share it: the weights that a key/value head's queries of
            the scoring rows give each context key, summed; other keys' stay as they are.
        context: `[n]`, bool: the keys to score.
        scoring_rows: `[m]`, bool: the rows that ask.
        context_softmax: Whether each row's weights are normalised over the visible context keys only, or are the
            attention really paid (over everything the row sees, sinks included).
        scaling: Factor on the logits.
        softcap: Logit soft-capping, or `None`.
        sinks: `[H]` sink logits, or `None`.

    Returns:
        `[m, H, Dv]` in the dtype of `query`.
    """
    num_heads, num_rows, _ = query.shape
    num_kv_heads = keys.shape[0]
    output = query.new_empty(num_rows, num_heads, values.shape[-1])
    context_columns = context.float()
    for block in blocks:
        rows, span = block.rows, block.keys
        packed = _pack(query, rows, num_kv_heads)
        block_sinks = _pack_sinks(sinks, rows.stop - rows.start, num_kv_heads)
        weights = _probabilities(packed, keys[:, span], block.mask, scaling, softcap, block_sinks)
        attended = torch.matmul(weights.to(values.dtype), values[:, span])
        output[rows] = attended.reshape(num_heads, -1, values.shape[-1]).transpose(0, 1)

        # Softmax over the context alone = the full row's weights divided by their context part. A row that sees no
        # context (a sliding window past it) has no say: its part is 0 and stays 0.
        weight_of_row = scoring_rows[rows].float().repeat(num_heads).reshape(num_kv_heads, 1, -1)
        if context_softmax:
            context_part = torch.matmul(weights, context_columns[span]).unsqueeze(1)
            weight_of_row = weight_of_row / context_part.clamp_min(torch.finfo(torch.float32).tiny)
        mass[:, span].addcmul_(torch.matmul(weight_of_row, weights)[:, 0], context_columns[span])
    return output
