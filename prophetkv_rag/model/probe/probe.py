"""The probe: proves at load, layer by layer, that a model's caches can be re-positioned exactly, or refuses it.

No model is known by name. Four questions are put to the model itself, on tokens drawn from its vocabulary:

1. Single tokens at position 0 and elsewhere (one token sees only itself, so nothing but the rotation may change): are
   values independent of the position, and are keys at p the keys at 0, rotated by one of the model's own frequency
   tables, or not rotated at all? Asked up to the last position of the context window, so that frequencies that change
   with the length (longrope, dynamic NTK inside the window) do not pass; nor do queries scaled by the cache's length.
2. Does every layer call the attention interface, once, with keys and values that it put into the cache?
3. Which keys does each layer's mask show a row: all before it, or a sliding window? Anything else is refused.
4. Do our own encoding pass (positions 0, rotation outside) and the model's plain forward agree on a short sequence?
"""

from __future__ import annotations

from typing import Any

import torch

from prophetkv_rag.errors import UnsupportedModelError
from prophetkv_rag.model.attention import model_lock
from prophetkv_rag.model.probe.calls import run_single_tokens
from prophetkv_rag.model.probe.checks import check_encoding, check_rows
from prophetkv_rag.model.probe.rotation import find_rotation, rotation_candidates
from prophetkv_rag.model.probe.tolerance import relative_error, tolerance_of
from prophetkv_rag.model.probe.window import window_of
from prophetkv_rag.model.support import LayerSupport, ModelSupport

NUM_TOKENS = 24


def probe_model(model: Any) -> ModelSupport:
    """Probe a transformers causal language model.

    Args:
        model: The loaded model, in evaluation mode.

    Returns:
        What was found, layer by layer.

    Raises:
        UnsupportedModelError: If chunk caches of this model could not be re-positioned exactly; the message names the
            layer and the reason.
    """
    name = str(getattr(model.config, "model_type", type(model).__name__))
    try:
        with model_lock(model):
            return _probe(model, name)
    except UnsupportedModelError as error:
        msg = f"{name} cannot be used: {error}. Any model that `prophetkv-rag doctor MODEL` accepts will do"
        raise UnsupportedModelError(msg) from error.__cause__


def _probe(model: Any, name: str) -> ModelSupport:
    config = model.config.get_text_config(decoder=True)
    _refuse_by_structure(model, config)
    num_layers = int(config.num_hidden_layers)
    context_window = int(getattr(config, "max_position_embeddings", 0) or 0)
    if context_window < NUM_TOKENS + 1:
        msg = f"its configuration gives no usable context window (max_position_embeddings = {context_window})"
        raise UnsupportedModelError(msg)
    device, dtype = model.device, model.dtype
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, int(config.vocab_size), (NUM_TOKENS,), generator=generator).to(device)

    origin, masks = run_single_tokens(model, tokens, 0, num_layers)
    candidates = rotation_candidates(model)  # before longer positions, which make some models rewrite their tables
    far = sorted({1, 7, min(331, context_window - 1), context_window // 2, context_window - 1})
    moved = {position: run_single_tokens(model, tokens, position, num_layers)[0] for position in far}
    counted, _ = run_single_tokens(model, tokens, far[-1], num_layers, seen=far[-1])
    layers = []
    for index in range(num_layers):
        rotation = find_rotation(index, origin[index], {p: calls[index] for p, calls in moved.items()}, candidates)
        call = origin[index]
        if relative_error(counted[index].query, moved[far[-1]][index].query) > tolerance_of(dtype):
            msg = (
                f"layer {index} scales its queries by the number of cached tokens rather than by their positions, "
                "which goes wrong for single rows"
            )
            raise UnsupportedModelError(msg)
        layers.append(
            LayerSupport(
                rotation=rotation,
                num_attention_heads=call.query.shape[1],
                num_key_value_heads=call.key.shape[1],
                head_dim=call.key.shape[-1],
                value_head_dim=call.value.shape[-1],
                sliding_window=window_of(index, call, masks, context_window),
                softcap=call.softcap,
                has_sinks=call.sinks is not None,
                max_error=0.0,
            )
        )
    checked = check_encoding(model, tokens, layers)
    check_rows(model, tokens, checked)
    return ModelSupport(
        model_type=name,
        context_window=context_window,
        dtype=str(dtype).removeprefix("torch."),
        layers=checked,
    )


def _refuse_by_structure(model: Any, config: Any) -> None:
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        msg = "it is not a decoder-only language model"
        raise UnsupportedModelError(msg)
    for index, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
            msg = f"layer {index} is a {kind} layer, whose recurrent state is not a cache with one row per token"
            raise UnsupportedModelError(msg)
    if getattr(config, "num_kv_shared_layers", 0):
        msg = "its last layers share the keys and values of earlier ones"
        raise UnsupportedModelError(msg)
