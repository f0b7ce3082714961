"""Whether ProphetKV can serve what vLLM is about to serve: asked of its settings, and of its loaded module.

Refusals come at start, with the reason; nothing is served approximately by accident.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import vllm
from vllm.v1.kv_cache_interface import FullAttentionSpec

from prophetkv_rag.errors import InputError, UnsupportedModelError
from prophetkv_rag.integrations.vllm.runner import VLLMRunner
from prophetkv_rag.model import (
    AttentionCall,
    AttentionPass,
    LayerSupport,
    ModelSupport,
    PassJob,
    RopeTables,
    Rotation,
    find_rotation,
)

OLDEST, NEWEST = (0, 31), (0, 32)
"""Releases of vLLM that this was run with, first and last; others are refused."""

_PROBED_TOKENS = 8


def check_release(version: str = vllm.__version__) -> None:
    """Raise `InputError` for a release of vLLM that this was not run with."""
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not OLDEST <= release <= NEWEST:
        low, high = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        msg = f"vLLM {version} was not tested with this version of prophetkv-rag; install one from {low} to {high}"
        raise InputError(msg)


def check_config(config: Any) -> None:
    """Raise with the reason where vLLM is set to something that we cannot serve.

    Raises:
        InputError: What to set otherwise.
        UnsupportedModelError: If it is the model.
    """
    parallel, model = config.parallel_config, config.model_config
    for name, what in (
        ("pipeline_parallel_size", "pipeline parallelism"),
        ("data_parallel_size", "data parallelism inside one vLLM"),
        ("decode_context_parallel_size", "decode context parallelism"),
        ("prefill_context_parallel_size", "prefill context parallelism"),
    ):
        size = getattr(parallel, name, 1)
        if size > 1:
            msg = f"{name} is {size}: {what} is not supported; use tensor parallelism, or several vLLM servers"
            raise InputError(msg)
    if config.lora_config is not None:
        msg = "LoRA is on (--enable-lora): chunk caches are of the base model; serve merged weights, or leave it off"
        raise InputError(msg)
    if config.speculative_config is not None:
        msg = "speculative decoding is not supported: a draft model's cache would be missing; leave it off"
        raise InputError(msg)
    transfer = config.kv_transfer_config
    if any(frame.endswith("multi_connector") for frame in _callers()):
        msg = "behind MultiConnector other connectors would save approximate blocks; use ProphetKVConnector alone"
        raise InputError(msg)
    if transfer.kv_load_failure_policy != "recompute":
        msg = (
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}: a lost chunk cache would fail its "
            'request; add "kv_load_failure_policy": "recompute" to --kv-transfer-config'
        )
        raise InputError(msg)
    if transfer.kv_role != "kv_consumer":
        msg = f'kv_role is {transfer.kv_role!r}; give "kv_role": "kv_consumer" in --kv-transfer-config'
        raise InputError(msg)
    refusal = _model_refusal(config, model)
    if refusal is not None:
        msg = f"{model.model} is not supported: {refusal}"
        raise UnsupportedModelError(msg)


def _model_refusal(config: Any, model: Any) -> str | None:
    if model.runner_type != "generate":
        return f"it does not generate text (runner {model.runner_type})"
    if model.use_mla:
        return "it keeps compressed latents instead of keys and values (MLA)"
    if getattr(model, "is_encoder_decoder", False):
        return "it is an encoder-decoder (cross-attention)"
    if getattr(model, "is_hybrid", False) or getattr(model, "is_attention_free", False):
        return "some of its layers keep a state instead of keys and values (SSM)"
    if getattr(model, "uses_mrope", False):
        return "its positions are not one number a token (M-RoPE)"
    if str(config.cache_config.cache_dtype).startswith(("fp8", "nvfp4", "int8")):
        return f"the KV cache is quantised ({config.cache_config.cache_dtype}); leave --kv-cache-dtype at auto"
    return None


def _callers() -> list[str]:
    names, frame = [], sys._getframe(1)
    while frame is not None:
        names.append(frame.f_globals.get("__name__", ""))
        frame = frame.f_back  # type: ignore[assignment]
    return names


def probe_module(runner: VLLMRunner, config: Any) -> ModelSupport:
    """Find out how the loaded module treats positions, layer by layer.

    Raises:
        UnsupportedModelError: With the layer and the reason, if its caches cannot be re-positioned exactly.
    """
    refusals = [reason for layer in runner.layers if (reason := _layer_refusal(layer)) is not None]
    if refusals:
        raise UnsupportedModelError(refusals[0])
    window = config.model_config.max_model_len
    ids = torch.arange(_PROBED_TOKENS, device=runner.device) * 7 + 11
    ids %= config.model_config.get_vocab_size()
    places = sorted({1, 2, 17, window // 2, window - 1} - {0})
    origin = _observe(runner, ids, 0)
    moved = {place: _observe(runner, ids, place) for place in places}
    candidates = _candidates(runner.model, config.model_config)
    layers, rotations = [], []
    for index, layer in enumerate(runner.layers):
        calls = {place: found[index] for place, found in moved.items()}
        rotations.append(find_rotation(index, origin[index], calls, candidates))
        layers.append(
            LayerSupport(
                rotation=rotations[index],
                num_attention_heads=layer.num_heads,
                num_key_value_heads=layer.num_kv_heads,
                head_dim=layer.head_size,
                value_head_dim=layer.head_size_v,
                sliding_window=layer.sliding_window,
                softcap=float(getattr(layer.impl, "logits_soft_cap", None) or 0) or None,
                has_sinks=False,
                max_error=max(_error(calls[place], origin[index], place, rotations[index]) for place in places),
            )
        )
    return ModelSupport(
        model_type=str(config.model_config.hf_config.model_type),
        context_window=window,
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        layers=tuple(layers),
    )


def _error(moved: AttentionCall, origin: AttentionCall, place: int, rotation: Rotation | None) -> float:
    """Return how far the keys at a place are from those at position 0, rotated there."""
    expected = RopeTables(torch.tensor([place], device=origin.key.device)).rotate(origin.key, rotation)
    return float((moved.key - expected).abs().max() / expected.abs().max())


def _layer_refusal(layer: Any) -> str | None:
    name = layer.layer_name
    if getattr(layer, "attn_type", "decoder") != "decoder":
        return f"{name} is no causal self-attention ({layer.attn_type})"
    if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
        return f"{name} shares the keys and values of {layer.kv_sharing_target_layer_name}"
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        return f"{name} biases attention by distance (ALiBi)"
    if getattr(layer, "has_sink", False) or getattr(layer.impl, "sinks", None) is not None:
        return f"{name} has attention sinks, which were not tried"
    if not hasattr(layer.impl, "do_kv_cache_update"):
        return f"{name}'s attention backend ({type(layer.impl).__name__}) does not write its pages by itself"
    return None


class _Observing(AttentionPass):
    """Every row sees itself alone, so that hidden states do not depend on positions."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Keep the call; the output of a row that sees one key is that key's value."""
        self.calls.append(call)
        return call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1).transpose(1, 2)


class _Fresh:
    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return key.clone(), value.clone()


def _observe(runner: VLLMRunner, ids: torch.Tensor, place: int) -> list[AttentionCall]:
    observing = _Observing()
    positions = torch.full_like(ids, place)[None]
    runner.run([PassJob(observing, ids[None], positions, [_Fresh()] * len(runner.layers))])
    return observing.calls


def _candidates(module: Any, model_config: Any) -> list[Rotation]:
    """Return the frequency tables that the module may rotate by: its own parts', and what its configuration says."""
    tables: list[tuple[float, ...]] = []

    def add(frequencies: Any) -> None:
        table = tuple(frequencies.double().cpu().tolist())
        if table and table not in tables:
            tables.append(table)

    for part in module.modules():
        for name in ("inv_freq", "_compute_inv_freq"):
            found = getattr(part, name, None)
            try:
                if callable(found):
                    argument = getattr(part, "scaling_factor", None) if "scaling_factor" in _names(found) else part.base
                    found = found(argument)
                if isinstance(found, torch.Tensor) and found.ndim == 1:
                    add(found)
            except (AttributeError, TypeError, ValueError):  # another kind of rotation: the configuration may say it
                continue
    try:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = model_config.hf_text_config
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if kind in ROPE_INIT_FUNCTIONS:
            add(ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0])
    except (AttributeError, KeyError, TypeError, ValueError):  # of a kind that transformers does not know either
        pass
    return [
        Rotation(tuple(sign * one for one in table), interleaved)
        for sign in (1.0, -1.0)
        for table in tables
        for interleaved in (False, True)
    ]


def _names(function: Any) -> tuple[str, ...]:
    return tuple(function.__code__.co_varnames[: function.__code__.co_argcount])


def check_pages(kv_cache_config: Any) -> None:
    """Raise `UnsupportedModelError` where vLLM keeps a request's rows in several kinds of pages."""
    groups = kv_cache_config.kv_cache_groups if kv_cache_config is not None else []
    if len(groups) > 1:
        msg = f"vLLM keeps this model's cache in {len(groups)} groups of layers; only one is supported"
        raise UnsupportedModelError(msg)


def keeps_all_rows(kv_cache_config: Any) -> bool:
    """Whether a request's rows stay in its pages. Those that a sliding window has left behind, vLLM gives away."""
    groups = kv_cache_config.kv_cache_groups if kv_cache_config is not None else []
    specs = [
        spec
        for group in groups
        for spec in getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values()
    ]
    return bool(specs) and all(isinstance(spec, FullAttentionSpec) for spec in specs)
