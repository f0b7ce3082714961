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

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from prophetkv_rag.errors import UnsupportedModelError
from prophetkv_rag.model.attention import AttentionCall, model_lock
from prophetkv_rag.model.cache_layers import RowsLayer, cache_of
from prophetkv_rag.model.forward import backbone, run_pass
from prophetkv_rag.model.passes import EncodePass, RowsPass
from prophetkv_rag.model.probe_calls import MaskRecorder, run_single_tokens
from prophetkv_rag.model.rope import RopeTables, Rotation
from prophetkv_rag.model.support import LayerSupport, ModelSupport

NUM_TOKENS = 24
MAX_MASK_POSITIONS = 1 << 20
# Relative to the largest entry. Half precision compares two roundings of the same number through several layers.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}
# An angle computed in fp32, as models do, is off by up to this much per position.
ANGLE_ERROR_PER_POSITION = 2.4e-7


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
    candidates = _rotation_candidates(model)  # before longer positions, which make some models rewrite their tables
    far = sorted({1, 7, min(331, context_window - 1), context_window // 2, context_window - 1})
    moved = {position: run_single_tokens(model, tokens, position, num_layers)[0] for position in far}
    counted, _ = run_single_tokens(model, tokens, far[-1], num_layers, seen=far[-1])
    layers = []
    for index in range(num_layers):
        rotation = _find_rotation(index, origin[index], {p: calls[index] for p, calls in moved.items()}, candidates)
        call = origin[index]
        if _relative_error(counted[index].query, moved[far[-1]][index].query) > TOLERANCE.get(dtype, 2e-4):
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
                sliding_window=_window_of(index, call, masks, context_window),
                softcap=call.softcap,
                has_sinks=call.sinks is not None,
                max_error=0.0,
            )
        )
    checked = _check_encoding(model, tokens, layers)
    _check_rows(model, tokens, checked)
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


def _rotation_candidates(model: Any) -> list[Rotation]:
    """Return the model's own frequency tables: every buffer named `*inv_freq`, paired both ways, turning both ways."""
    tables = []
    for module in model.modules():
        for buffer_name, buffer in module.named_buffers(recurse=False):
            if buffer_name.endswith("inv_freq") and "original" not in buffer_name and buffer.ndim == 1:
                frequencies = tuple(buffer.double().tolist())
                if frequencies and frequencies not in tables:
                    tables.append(frequencies)
    return [
        Rotation(tuple(sign * frequency for frequency in table), interleaved)
        for sign in (1.0, -1.0)
        for table in tables
        for interleaved in (False, True)
    ]


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    scale = max(float(expected.abs().max()), 1e-30)
    return float((actual.double() - expected.double()).abs().max()) / scale


def _find_rotation(
    index: int, origin: AttentionCall, moved: dict[int, AttentionCall], candidates: list[Rotation]
) -> Rotation | None:
    """Return the rotation that explains this layer's keys at every probed position; `None` for no rotation at all."""
    tolerance = TOLERANCE.get(origin.key.dtype, 2e-4)
    for position, call in moved.items():
        if _relative_error(call.value, origin.value) > tolerance:
            msg = f"layer {index}'s values change with the position (learned absolute positions?), seen at {position}"
            raise UnsupportedModelError(msg)
    if all(_relative_error(call.key, origin.key) <= tolerance for call in moved.values()):
        return None
    worst: dict[int, float] = {}
    for candidate in candidates:
        if candidate.rotary_dim > origin.key.shape[-1]:
            continue
        errors = {}
        for position, call in moved.items():
            tables = RopeTables(torch.tensor([position], device=call.key.device))
            errors[position] = _relative_error(tables.rotate(origin.key, candidate), call.key)
        if all(error <= tolerance + ANGLE_ERROR_PER_POSITION * position for position, error in errors.items()):
            return candidate
        worst = min(worst or errors, errors, key=lambda found: sum(found.values()))
    near, far = min(moved), max(moved)
    if worst and worst[near] <= tolerance and worst[far] > tolerance:
        msg = (
            f"layer {index}'s rotation fits near the start but not at position {far} (error {worst[far]:.1e}): its "
            "frequencies depend on the prompt's length (longrope or dynamic scaling)"
        )
    else:
        msg = f"layer {index}'s keys at a new position are not its keys at position 0, rotated by a known table"
    raise UnsupportedModelError(msg)


def _window_of(index: int, call: AttentionCall, masks: MaskRecorder, context_window: int) -> int | None:
    """Return the sliding window that the layer's mask really draws inside the context window, or `None` for all."""
    rule = masks.rule_of(call.attention_mask)
    last = min(context_window, MAX_MASK_POSITIONS) - 1
    if rule is None:
        return call.sliding_window if call.sliding_window is not None and call.sliding_window <= last else None
    windows = set()
    for row in (last, last - 1, last // 2 + 1):
        keys = torch.arange(last + 1)
        visible = rule(torch.tensor(0), torch.tensor(0), torch.tensor(row), keys).expand(last + 1)
        first = int(visible.to(torch.int8).argmax())
        if not bool(visible[first : row + 1].all()) or bool(visible[row + 1 :].any()):
            msg = f"layer {index}'s mask is neither causal nor a sliding window"
            raise UnsupportedModelError(msg)
        windows.add(None if first == 0 else row - first + 1)
    # A window longer than half the context hides nothing from the middle row.
    windows = windows if len(windows) == 1 else windows - {None}
    if len(windows) != 1:
        msg = f"layer {index} attends in chunks, which a shifted chunk cache cannot reproduce"
        raise UnsupportedModelError(msg)
    return windows.pop()


def _own_forward(model: Any, tokens: torch.Tensor, num_layers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    layers = [DynamicLayer() for _ in range(num_layers)]
    with torch.no_grad():
        backbone(model)(
            input_ids=tokens[None],
            position_ids=torch.arange(tokens.shape[0], device=tokens.device)[None],
            past_key_values=cache_of(layers),
            use_cache=True,
        )
    return [(layer.keys[0], layer.values[0]) for layer in layers]


def _check_encoding(model: Any, tokens: torch.Tensor, layers: Sequence[LayerSupport]) -> tuple[LayerSupport, ...]:
    """Compare our encoding of a sequence with the model's own forward, layer by layer."""
    expected = _own_forward(model, tokens, len(layers))
    tolerance = TOLERANCE.get(expected[0][0].dtype, 2e-4)
    errors = _encoding_errors(model, tokens, layers, expected)
    for index, error in enumerate(errors):
        if error > tolerance:
            msg = (
                f"layer {index}'s keys and values from our own pass differ from the model's by {error:.1e} "
                f"(allowed {tolerance:.0e}): its attention does something that the interface does not tell"
            )
            raise UnsupportedModelError(msg)
    return tuple(replace(layer, max_error=error) for layer, error in zip(layers, errors, strict=True))


def _encoding_errors(
    model: Any, tokens: torch.Tensor, layers: Sequence[LayerSupport], expected: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[float]:
    cache = [DynamicLayer() for _ in layers]
    encode = EncodePass(layers, seq_len=tokens.shape[0], device=tokens.device)
    run_pass(
        model,
        encode,
        input_ids=tokens[None],
        position_ids=torch.zeros_like(tokens)[None],
        cache=cache_of(cache),
    )
    errors = []
    for layer, held, (keys, values) in zip(layers, cache, expected, strict=True):
        rotated = encode.tables.rotate(held.keys[0], layer.rotation)
        errors.append(max(_relative_error(rotated, keys), _relative_error(held.values[0], values)))
    return errors


def _check_rows(model: Any, tokens: torch.Tensor, layers: tuple[LayerSupport, ...]) -> None:
    """Compare scattered rows computed into an exact cache with the same rows of the model's own forward."""
    expected = _own_forward(model, tokens, len(layers))
    tolerance = TOLERANCE.get(expected[0][0].dtype, 2e-4)
    rows = torch.arange(1, tokens.shape[0], 3, device=tokens.device)
    cache = []
    for keys, values in expected:
        layer = RowsLayer(keys[None].clone(), values[None].clone())
        layer.keys[:, :, rows] = 0
        layer.values[:, :, rows] = 0
        layer.rows = rows
        cache.append(layer)
    run_pass(
        model,
        RowsPass(layers, rows),
        input_ids=tokens[None, rows],
        position_ids=rows[None],
        cache=cache_of(cache),
    )
    for index, (layer, (keys, values)) in enumerate(zip(cache, expected, strict=True)):
        error = max(_relative_error(layer.keys[0], keys), _relative_error(layer.values[0], values))
        if error > tolerance:
            msg = f"layer {index}'s rows, computed without their neighbours, differ from a plain forward by {error:.1e}"
            raise UnsupportedModelError(msg)
