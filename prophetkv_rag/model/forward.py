"""The model's own forward over given rows, with our attention in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache

from prophetkv_rag.model.ambient import own_state
from prophetkv_rag.model.attention import AttentionPass, attention_implementation
from prophetkv_rag.model.cache_argument import cache_argument
from prophetkv_rag.model.uncompiled import uncompiled


@contextmanager
def running(model: Any) -> Iterator[None]:
    """Run the model in a block: in a state of our own, and as it was before it was compiled."""
    with own_state(), uncompiled(model):
        yield


def backbone(model: Any) -> Any:
    """Return the model without its language-model head, from inside what wraps it (adapters)."""
    found = model
    while getattr(found, "base_model", found) is not found:
        found = found.base_model
    # Llama 4 names itself as its own base model.
    return found.model if getattr(found, "get_output_embeddings", lambda: None)() is not None else found


def plain_forward(model: Any, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Run the model's own forward, with the attention it was loaded with, and put the rows behind those in `cache`.

    Args:
        model: A transformers causal language model; the caller holds `model_lock`.
        input_ids: `[b, m]`.
        cache: Grows by m rows.

    Returns:
        `[b, vocab]` logits of the last row in fp32.
    """
    with running(model):
        output = model(input_ids=input_ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    last: torch.Tensor = output.logits[:, -1].float()
    return last


def run_pass(
    model: Any,
    attention_pass: AttentionPass,
    *,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Cache,
    logits: bool = False,
) -> torch.Tensor | None:
    """Run the model's own forward over the given rows with our attention.

    Args:
        model: A transformers causal language model.
        attention_pass: Gets every layer's attention call.
        input_ids: `[b, m]` tokens of the rows.
        position_ids: `[b, m]` positions that the model rotates by.
        cache: Its layers receive the rows' keys and values.
        logits: Whether to run the language-model head on the last row.

    Returns:
        `[b, vocab]` logits of the last row in fp32, or `None`.
    """
    # A ready 4-D mask makes transformers skip building one; the pass masks by position itself.
    no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    arguments = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": no_mask,
        "use_cache": True,
    }
    with running(model), attention_implementation(model, attention_pass):
        if not logits:
            headless = backbone(model)
            headless(**arguments, **cache_argument(headless, cache))
            return None
        output = model(**arguments, **cache_argument(model, cache), logits_to_keep=1)
    last: torch.Tensor = output.logits[:, -1].float()
    return last


def decoder_layers(model: Any, num_layers: int) -> list[torch.nn.Module]:
    """Return the decoder layers in order: the module list that is as long as the model is deep."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            holds_attention = all(
                any(getattr(part, "layer_idx", None) == index for part in layer.modules())
                for index, layer in enumerate(module)
            )
            if holds_attention:
                return list(module)
    msg = f"no list of {num_layers} decoder layers found in {type(model).__name__}"
    raise LookupError(msg)
