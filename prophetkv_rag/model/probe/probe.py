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

from collections.abc import Mapping
from typing import Any

import torch

from prophetkv_rag.errors import InputError, UnsupportedModelError
from prophetkv_rag.kernels import ops
from prophetkv_rag.model.ambient import own_state
from prophetkv_rag.model.attention import AttentionCall, model_lock
from prophetkv_rag.model.probe.calls import run_single_tokens
from prophetkv_rag.model.probe.checks import check_encoding, check_rows
from prophetkv_rag.model.probe.rotation import find_rotation, rotation_candidates
from prophetkv_rag.model.probe.structure import refuse_by_structure, refuse_what_is_no_model
from prophetkv_rag.model.probe.tolerance import relative_error, tolerance_of
from prophetkv_rag.model.probe.window import window_of
from prophetkv_rag.model.support import LayerSupport, ModelSupport

NUM_TOKENS = 24


@own_state()
def probe_model(model: Any) -> ModelSupport:
    """Probe a transformers causal language model.

    Args:
        model: The loaded model; it is set to evaluation mode.

    Returns:
        What was found, layer by layer.

    Raises:
        UnsupportedModelError: If chunk caches of this model could not be re-positioned exactly; the message names the
            layer and the reason.
        InputError: If the kernels that are asked for (an environment variable) are none, or not for its device.
    """
    try:
        ops.in_use(getattr(model, "device", torch.device("cpu")))  # what has none is refused below
    except ValueError as error:
        raise InputError(str(error)) from None
    name = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    try:
        refuse_what_is_no_model(model)
        with model_lock(model):
            return _probe(model.eval(), name)
    except UnsupportedModelError as error:
        msg = f"{name} cannot be used: {error}. Any model that `prophetkv-rag doctor MODEL` accepts will do"
        raise UnsupportedModelError(msg) from error.__cause__


def _probe(model: Any, name: str) -> ModelSupport:
    config = model.config.get_text_config(decoder=True)
    refuse_by_structure(model, config)
    num_layers = int(config.num_hidden_layers)
    context_window = int(getattr(config, "max_position_embeddings", 0) or 0)
    if context_window < NUM_TOKENS + 1:
        msg = f"its configuration gives no usable context window (max_position_embeddings = {context_window})"
        raise UnsupportedModelError(msg)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, int(config.vocab_size), (NUM_TOKENS,), generator=generator).to(model.device)

    origin, masks = run_single_tokens(model, tokens, 0, num_layers)
    dtype = _dtype_of(origin)
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


def _dtype_of(calls: Mapping[int, AttentionCall]) -> torch.dtype:
    """Return the dtype of all keys and values, which need not be that of the weights (quantised ones, say)."""
    dtypes = {
        str(tensor.dtype).removeprefix("torch."): tensor.dtype for c in calls.values() for tensor in (c.key, c.value)
    }
    if len(dtypes) > 1:
        msg = f"its layers' keys and values have several dtypes ({', '.join(sorted(dtypes))})"
        raise UnsupportedModelError(msg)
    return next(iter(dtypes.values()))
