"""PyTorch implementations of the reuse path's operations; they are the CPU path and the kernels' reference.

Shapes: H query heads, Hkv key/value heads, G = H // Hkv, m computed rows, n keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

BLOCK_ELEMENTS = 384
"""Query rows x groups handled per attention call: large enough for the matrix products, small enough that a block of
scattered rows sees few keys beyond each row's own position."""
MASK_CACHE_BYTES = 64 << 20
"""Masks of a pass are shared by all its layers up to this size; beyond it each call makes its own again."""
MIN_PLAIN_KEYS = 256
"""Keys before a block that are worth an attention call of their own, without a mask."""

# SDPA's CPU kernel as SDPA calls it: unlike the public function it also returns the log-sum-exp, with which two parts
# of a softmax are joined exactly. It is not documented, so it may go; then the masked public function does the work.
_FLASH_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


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


class RowBlock(NamedTuple):
    """Some rows of a pass and the keys they may see."""

    rows: slice
    plain: slice
    """Keys that every row of the block sees; may be empty."""
    masked: slice
    """The keys after them, up to the block's last row; never empty."""
    mask: torch.Tensor
    """Additive fp32 mask `[G * block rows, masked keys]`: 0 or -inf; each row sees at least one masked key, unless
    `hidden_keys` hides them all."""

    @property
    def keys(self) -> slice:
        """All keys of the block."""
        return slice(self.plain.start, self.masked.stop)


class RowBlocks:
    """The rows of a pass cut into blocks, each with the keys it may see and the mask for it.

    A dense `[m, n]` mask would waste work and memory traffic: sorted rows in blocks need keys only up to their own last
    position (and, with a sliding window, from their own first), and only those after the block's first row need a
    mask. Made once per pass and window, shared by the layers.
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

    def __iter__(self) -> Iterator[RowBlock]:
        """Yield the blocks in order."""
        for start in range(0, len(self._positions), self._block_rows):
            stop = min(start + self._block_rows, len(self._positions))
            first, last = self._positions[start], self._positions[stop - 1]
            key_start = 0 if self.sliding_window is None else max(0, first - self.sliding_window + 1)
            # Up to the first row every key is plain, unless some are hidden or fall out of the last row's window.
            everything = self.hidden_keys is None and (self.sliding_window is None or last < self.sliding_window)
            boundary = first if everything and first - key_start >= MIN_PLAIN_KEYS else key_start
            mask = self._mask(start, stop, boundary, last + 1)
            yield RowBlock(slice(start, stop), slice(key_start, boundary), slice(boundary, last + 1), mask)

    def _mask(self, start: int, stop: int, key_start: int, key_stop: int) -> torch.Tensor:
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
    if _FLASH_CPU is None or query.device.type != "cpu" or keys.shape[-1] != values.shape[-1]:
        padded = F.pad(mask, (plain_keys.shape[2], 0))
        span = block.keys
        return F.scaled_dot_product_attention(
            query, keys[None, :, span], values[None, :, span], attn_mask=padded, scale=scaling
        )[0]
    # Two calls, so that most keys are read without a mask beside them; then joined: with the log-sum-exps a and b of
    # the two parts, the softmax over both gives the first the weight e^a / (e^a + e^b).
    plain, plain_lse = _FLASH_CPU(query, plain_keys, plain_values, scale=scaling)
    masked, masked_lse = _FLASH_CPU(query, masked_keys, masked_values, attn_mask=mask, scale=scaling)
    share = torch.sigmoid(plain_lse - masked_lse)[..., None].to(plain.dtype)
    joined: torch.Tensor = torch.lerp(masked, plain, share)
    return joined[0]


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
        mass[span] += torch.matmul(weight_of_row, weights).sum(dim=(0, 1))
    num_scoring = int(scoring_rows.sum())
    return output, mass.mul_(context_columns).div_(max(1, num_scoring) * num_heads)
