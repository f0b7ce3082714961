"""How much arithmetic a prefill is, counted: what a speed can be at best, whatever the machine.

A pass over m rows costs two operations per weight and row, and per attention head four times the head dimension for
every key that a row sees. Rows that a question picks stand late in the prompt, so they see more keys than the average
row: a fraction p of the rows costs more than p of full prefill, the more so the longer the prompt.
"""

from __future__ import annotations

from typing import Any

import torch

from prophetkv_rag.model import ModelSupport, backbone
from prophetkv_rag.prompt import PromptLayout


def pass_flops(
    model: Any, support: ModelSupport, positions: torch.Tensor, visible: torch.Tensor | None = None
) -> float:
    """Return the operations of one pass over the rows at `positions` (`[m]`), without the language-model head.

    Embeddings are looked up, not multiplied; all else that has two dimensions counts as a matrix product. With
    `visible`, ascending positions, rows see only those keys among the ones before them.
    """
    embeddings = {id(weight) for weight in model.get_input_embeddings().parameters()}
    weights: int = sum(p.numel() for p in backbone(model).parameters() if p.dim() >= 2 and id(p) not in embeddings)
    total = 2.0 * weights * positions.shape[0]
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    for layer in support.layers:
        seen = _keys_until(positions, visible)
        if layer.sliding_window is not None:
            seen = seen - _keys_until((positions - layer.sliding_window).clamp_min(-1), visible)
        total += 2.0 * heads * (layer.head_dim + layer.value_head_dim) * float(seen.sum())
    return total


def _keys_until(positions: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """How many keys stand at or before each position."""
    return positions + 1 if visible is None else torch.searchsorted(visible, positions, right=True)


def full_flops(model: Any, support: ModelSupport, layout: PromptLayout) -> float:
    """Return full prefill's operations on a prompt."""
    return pass_flops(model, support, torch.arange(layout.num_tokens))


def reuse_flops(
    model: Any,
    support: ModelSupport,
    layout: PromptLayout,
    recomputed: torch.Tensor,
    visible: torch.Tensor | None = None,
) -> float:
    """Return a reused prefill's operations; full prefill's over these is how many times sooner it could be at most.

    Args:
        model: The language model.
        support: The probe's findings.
        layout: The prompt.
        recomputed: `[k]`, the chunk tokens that ran through all layers (`PrefillResult.recomputed`).
        visible: What those attended to (`PrefillResult.visible`); `None` for everything before them.

    Counted are stage I (prefix and suffix) and stage II, with the same rows in every layer: a lower bound for
    strategies that run more rows in some layers, an upper one for a stage I that stops early.
    """
    fresh = (~layout.is_chunk).nonzero()[:, 0]
    outside = fresh[fresh >= layout.known_prefix]
    asking = outside[(outside < layout.context_start) | (outside >= layout.suffix_start)]
    outside = outside[outside >= layout.context_start]
    narrow = pass_flops(model, support, recomputed.cpu(), None if visible is None else visible.cpu())
    return pass_flops(model, support, asking) + pass_flops(model, support, outside) + narrow
