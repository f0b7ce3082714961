"""Watching a model run single tokens: every layer's attention call, and the rule that its mask draws.

A token that is a sequence of its own sees only itself, so its hidden states may not depend on its position: whatever
changes with the position is the rotation of queries and keys, and nothing else may.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from prophetkv_rag.errors import UnsupportedModelError
from prophetkv_rag.model.attention import AttentionCall, AttentionPass, attention_implementation
from prophetkv_rag.model.cache_argument import cache_argument
from prophetkv_rag.model.cache_layers import cache_of
from prophetkv_rag.model.forward import backbone, running


class CallRecorder(AttentionPass):
    """Notes each layer's call; a single token attends to itself only, so its output is its value."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Note the call and return what a lone token sees."""
        if call.layer_idx in self.calls:
            msg = f"layer {call.layer_idx} calls attention more than once per forward"
            raise UnsupportedModelError(msg)
        self.calls[call.layer_idx] = call
        groups = call.query.shape[1] // call.value.shape[1]
        output = call.value.repeat_interleave(groups, dim=1)
        if call.sinks is not None:  # the token shares its weight with the sink
            logit = (call.query * call.key.repeat_interleave(groups, dim=1)).sum(-1, keepdim=True) * call.scaling
            output = output * torch.sigmoid(logit - call.sinks.reshape(1, -1, 1, 1))
        return output.transpose(1, 2).contiguous()


class MaskRecorder:
    """A mask interface that returns a tensor of its own for each rule it is asked to draw, to tell the rules apart.

    The tensor is a valid (all-visible) mask of the single-token sequences that are run, for models that read it.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.rules: list[tuple[torch.Tensor, Callable[..., torch.Tensor]]] = []

    def __call__(self, *args: Any, mask_function: Any = None, **kwargs: Any) -> torch.Tensor | None:
        """Return the mask that stands for the rule, or `None` if there is no rule to draw."""
        if mask_function is None:
            return None
        token = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=self.device)
        self.rules.append((token, mask_function))
        return token

    def rule_of(self, mask: torch.Tensor | None) -> Callable[..., torch.Tensor] | None:
        """Return the rule behind a mask that a layer was given, or `None` if it was given none of ours."""
        return next((rule for token, rule in self.rules if token is mask), None)


class SeenLayer(DynamicLayer):
    """An empty cache layer that claims to have seen `seq_len` tokens."""

    def __init__(self, seq_len: int) -> None:
        super().__init__()
        self.seq_len = seq_len

    def get_seq_length(self) -> int:
        """Return the claim."""
        return self.seq_len


def run_single_tokens(
    model: Any, tokens: torch.Tensor, position: int, num_layers: int, *, seen: int = 0
) -> tuple[dict[int, AttentionCall], MaskRecorder]:
    """Run each token as a sequence of its own at `position`, behind `seen` tokens that the cache claims to hold.

    Returns:
        Every layer's attention call, and the masks that were drawn.

    Raises:
        UnsupportedModelError: If the forward pass fails, or a layer bypasses the attention interface or the cache.
    """
    recorder, masks = CallRecorder(), MaskRecorder(model.dtype, model.device)
    layers = [SeenLayer(seen) for _ in range(num_layers)]
    headless = backbone(model)
    try:
        with running(model), attention_implementation(model, recorder, mask_function=masks):
            headless(
                input_ids=tokens[:, None],
                position_ids=torch.full((tokens.shape[0], 1), position, dtype=torch.int64, device=tokens.device),
                use_cache=True,
                **cache_argument(headless, cache_of(layers)),
            )
    except UnsupportedModelError:
        raise
    except Exception as error:
        msg = f"its forward pass does not run with an own cache and attention ({type(error).__name__}: {error})"
        raise UnsupportedModelError(msg) from error
    for index in range(num_layers):
        call = recorder.calls.get(index)
        if call is None:
            msg = f"layer {index} does not use transformers' attention interface"
            raise UnsupportedModelError(msg)
        if layers[index].keys is None or layers[index].keys.shape != call.key.shape:
            msg = f"layer {index} does not keep its keys and values in a cache with one row per token"
            raise UnsupportedModelError(msg)
        if call.extra.get("position_bias") is not None:
            msg = f"layer {index} adds a position bias to its attention (ALiBi or T5 style)"
            raise UnsupportedModelError(msg)
    return recorder.calls, masks
