"""PyTorch implementations of the reuse path's operations; they are the CPU path and the kernels' reference.

Shapes: H query heads, Hkv key/value heads, G = H // Hkv, m computed rows, n keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

BLOCK_ELEMENTS = 384
"""Query rows x groups handled per attention call: large enough for the matrix products, small enough that a block of
scattered rows sees few keys beyond each row's own position."""
MASK_CACHE_BYTES = 64 << 20
"""Masks of a pass are shared by all its layers up to this size; beyond it each call makes its own again."""


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Apply a rotary embedding to un-rotated states.

    Args:
        states: `[..., n, D]`; fp16, bf16 or fp32.
        cos: `[n, r]` with 2r <= D, fp32; channels beyond 2r pass through.
        sin: `[n, r]`, fp32.
        interleaved: Pairs are (2i, 2i + 1) rather than (i, i + r).

    Returns:
        A new tensor of the shape and dtype of `states`; the rotation is done in fp32.
    """
    half = cos.shape[-1]
    rotated = torch.empty_like(states)
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


class RowBlocks:
    """The rows of a pass cut into blocks, each with the keys it may see and the mask for it.

    A dense `[m, n]` mask would waste work: sorted rows in blocks need keys only up to their own last position (and,
    with a sliding window, from their own first). Made once per pass and window, shared by the layers.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        *,
        num_groups: int,
        sliding_window: int | None = None,
        hidden_keys: torch.Tensor | None = None,
    ) -> None:
        """Plan the blocks.

        Args:
            rows: `[m]`, int64, ascending: the position of each computed row; key i has position i.
            num_groups: G, the query heads that share a key/value head.
            sliding_window: A row at p sees keys at positions > p - sliding_window; `None` for all.
            hidden_keys: `[n]`, bool: keys that no row may see (slots not filled yet), or `None`.
        """
        self.rows = rows
        self.num_groups = num_groups
        self.sliding_window = sliding_window
        self.hidden_keys = hidden_keys
        self._block_rows = max(16, BLOCK_ELEMENTS // num_groups)
        # One copy to the host here rather than two synchronisations per block and layer.
        self._positions = rows.tolist()
        self._masks: dict[int, torch.Tensor] = {}
        self._mask_bytes = 0

    def __iter__(self) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
        """Yield (rows, keys, additive fp32 mask `[G * block rows, block keys]` or `None` if every key is visible)."""
        for start in range(0, len(self._positions), self._block_rows):
            stop = min(start + self._block_rows, len(self._positions))
            key_start = 0
            if self.sliding_window is not None:
                key_start = max(0, self._positions[start] - self.sliding_window + 1)
            key_stop = self._positions[stop - 1] + 1
            yield slice(start, stop), slice(key_start, key_stop), self._mask(start, stop, key_start, key_stop)

    def _mask(self, start: int, stop: int, key_start: int, key_stop: int) -> torch.Tensor | None:
        if start in self._masks:
            return self._masks[start]
        rows = self.rows[start:stop, None]
        keys = torch.arange(key_start, key_stop, device=rows.device)[None, :]
        masked = keys > rows
        if self.sliding_window is not None:
            masked |= keys <= rows - self.sliding_window
        if self.hidden_keys is not None:
            masked |= self.hidden_keys[None, key_start:key_stop]
        mask = torch.zeros(masked.shape, dtype=torch.float32, device=rows.device).masked_fill_(masked, float("-inf"))
        mask = mask.repeat(self.num_groups, 1)
        if self._mask_bytes + mask.nbytes <= MASK_CACHE_BYTES:
            self._masks[start] = mask
            self._mask_bytes += mask.nbytes
        return mask


def _probabilities(
    query: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax of `query [Hkv, G * m, D]` over `keys [Hkv, n, D]` in fp32; `sinks [Hkv, G * m, 1]` join it."""
    logits = torch.matmul(query, keys.transpose(1, 2)).float().mul_(scaling)
    if softcap is not None:
        logits = torch.tanh(logits.div_(softcap)).mul_(softcap)
    if mask is not None:
        logits += mask
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

    Returns:
        `[m, H, Dv]` in the dtype of `query`.
    """
    num_heads, num_rows, _ = query.shape
    num_kv_heads = keys.shape[0]
    output = query.new_empty(num_rows, num_heads, values.shape[-1])
    for rows, span, mask in blocks:
        packed = _pack(query, rows, num_kv_heads)
        block_keys, block_values = keys[:, span], values[:, span]
        if softcap is None and sinks is None:
            mask_like = None if mask is None else mask.to(query.dtype)
            block = F.scaled_dot_product_attention(
                packed[None], block_keys[None], block_values[None], attn_mask=mask_like, scale=scaling
            )[0]
        else:
            block_sinks = _pack_sinks(sinks, rows.stop - rows.start, num_kv_heads)
            weights = _probabilities(packed, block_keys, mask, scaling, softcap, block_sinks)
            block = torch.matmul(weights.to(values.dtype), block_values)
        output[rows] = block.reshape(num_heads, rows.stop - rows.start, -1).transpose(0, 1)
    return output


def attend_and_score(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: RowBlocks,
    *,
    context: torch.Tensor,
    scoring_rows: torch.Tensor,
    context_softmax: bool,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as `selected_rows_attention`, and the attention mass that each context key receives.

    Args:
        query: `[H, m, D]`.
        keys: `[Hkv, n, D]`.
        values: `[Hkv, n, Dv]`.
        blocks: The rows' positions, window and hidden keys.
        context: `[n]`, bool: the keys to score.
        scoring_rows: `[m]`, bool: the rows that ask.
        context_softmax: Whether each row's weights are normalised over the visible context keys only, or are the
            attention really paid (over everything the row sees, sinks included).
        scaling: Factor on the logits.
        softcap: Logit soft-capping, or `None`.
        sinks: `[H]` sink logits, or `None`.

    Returns:
        The output `[m, H, Dv]`, and the mass `[n]` in fp32: the mean over heads and scoring rows of the weights
        (0 outside the context).
    """
    num_heads, num_rows, _ = query.shape
    num_kv_heads = keys.shape[0]
    output = query.new_empty(num_rows, num_heads, values.shape[-1])
    mass = torch.zeros(keys.shape[1], dtype=torch.float32, device=keys.device)
    context_columns = context.float()
    for rows, span, mask in blocks:
        block_rows = rows.stop - rows.start
        packed = _pack(query, rows, num_kv_heads)
        block_sinks = _pack_sinks(sinks, block_rows, num_kv_heads)
        weights = _probabilities(packed, keys[:, span], mask, scaling, softcap, block_sinks)
        block = torch.matmul(weights.to(values.dtype), values[:, span])
        output[rows] = block.reshape(num_heads, block_rows, -1).transpose(0, 1)

        # Softmax over the context alone = the full row's weights divided by their context part. A row that sees no
        # context (a sliding window past it) has no say: its part is 0 and stays 0.
        weight_of_row = scoring_rows[rows].float().repeat(num_heads).reshape(num_kv_heads, 1, -1)
        if context_softmax:
            context_part = torch.matmul(weights, context_columns[span]).unsqueeze(1)
            weight_of_row = weight_of_row / context_part.clamp_min(torch.finfo(torch.float32).tiny)
        mass[span] += torch.matmul(weight_of_row, weights).sum(dim=(0, 1))
    num_scoring = int(scoring_rows.sum())
    return output, mass.mul_(context_columns).div_(max(1, num_scoring) * num_heads)
