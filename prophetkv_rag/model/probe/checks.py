"""Question 4 of the probe: do our own passes, over a short sequence, agree with the model's plain forward?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from prophetkv_rag.errors import UnsupportedModelError
from prophetkv_rag.model.cache_argument import cache_argument
from prophetkv_rag.model.cache_layers import RowsLayer, cache_of
from prophetkv_rag.model.encode_pass import EncodePass
from prophetkv_rag.model.forward import run_pass, running
from prophetkv_rag.model.probe.tolerance import relative_error, tolerance_of
from prophetkv_rag.model.rows_pass import RowsPass
from prophetkv_rag.model.support import LayerSupport


def _own_forward(model: Any, tokens: torch.Tensor, num_layers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return every layer's (keys, values) of the whole model's own forward, with all that is wrapped around it."""
    layers = [DynamicLayer() for _ in range(num_layers)]
    try:
        with running(model):
            model(
                input_ids=tokens[None],
                position_ids=torch.arange(tokens.shape[0], device=tokens.device)[None],
                **cache_argument(model, cache_of(layers)),
                use_cache=True,
                logits_to_keep=1,
            )
    except Exception as error:
        msg = f"its own forward does not fill a cache ({type(error).__name__}: {error})"
        raise UnsupportedModelError(msg) from error
    for index, layer in enumerate(layers):
        num_rows = 0 if layer.keys is None else layer.keys.shape[-2]
        if num_rows != tokens.shape[0]:
            msg = (
                f"layer {index} keeps {num_rows} rows for {tokens.shape[0]} tokens: something stands before every "
                "prompt (prompt or prefix tuning?)"
            )
            raise UnsupportedModelError(msg)
    return [(layer.keys[0], layer.values[0]) for layer in layers]


def check_encoding(model: Any, tokens: torch.Tensor, layers: Sequence[LayerSupport]) -> tuple[LayerSupport, ...]:
    """Compare our encoding of a sequence with the model's own forward, layer by layer."""
    expected = _own_forward(model, tokens, len(layers))
    tolerance = tolerance_of(expected[0][0].dtype)
    errors = _encoding_errors(model, tokens, layers, expected)
    for index, error in enumerate(errors):
        if error > tolerance:
            msg = (
                f"layer {index}'s keys and values from our own pass differ from the model's by {error:.1e} "
                f"(allowed {tolerance:.0e}): its attention does something that the interface does not tell, "
                "or it computes more coarsely than its dtype says (quantised activations, a forward in autocast)"
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
        errors.append(max(relative_error(rotated, keys), relative_error(held.values[0], values)))
    return errors


def check_rows(model: Any, tokens: torch.Tensor, layers: tuple[LayerSupport, ...]) -> None:
    """Compare scattered rows computed into an exact cache with the same rows of the model's own forward."""
    expected = _own_forward(model, tokens, len(layers))
    tolerance = tolerance_of(expected[0][0].dtype)
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
        error = max(relative_error(layer.keys[0], keys), relative_error(layer.values[0], values))
        if error > tolerance:
            msg = (
                f"layer {index}'s rows, computed without their neighbours, differ from a plain forward by {error:.1e} "
                f"(allowed {tolerance:.0e}); so they do where activations are quantised by all rows together"
            )
            raise UnsupportedModelError(msg)
