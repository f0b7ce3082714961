"""What is refused before the model runs: what is no language model, is not all here, or says itself what it is."""

from __future__ import annotations

from typing import Any

import torch

from prophetkv_rag.errors import UnsupportedModelError


def refuse_what_is_no_model(model: Any) -> None:
    """Raise `UnsupportedModelError` for anything but a transformers model; wrappers are named with what is inside."""
    config = getattr(model, "config", None)
    if isinstance(model, torch.nn.Module) and hasattr(config, "get_text_config") and hasattr(model, "can_generate"):
        return
    inner = getattr(model, "module", None) if isinstance(model, torch.nn.Module) else None
    remedy = (
        "the model is inside: give ProphetKVEngine(model.module, ...)"
        if isinstance(inner, torch.nn.Module)
        else "give a model as AutoModelForCausalLM.from_pretrained returns it"
    )
    msg = f"a {type(model).__name__} is not a transformers causal language model; {remedy}"
    raise UnsupportedModelError(msg)


def refuse_by_structure(model: Any, config: Any) -> None:
    """Raise `UnsupportedModelError` for what the model's parts and settings say of it.

    Args:
        model: A transformers model.
        config: That of its text decoder.
    """
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
    _refuse_by_place(model)
    _refuse_by_adapters(model)


def _refuse_by_place(model: Any) -> None:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if "meta" in devices:
        msg = (
            "some of its weights are not in memory (device meta): they are offloaded, or were never loaded; load it "
            "whole onto one device, without an offloading device_map"
        )
        raise UnsupportedModelError(msg)
    if len(devices) > 1:
        msg = f"its weights lie on several devices ({', '.join(devices)}); load it whole onto one of them"
        raise UnsupportedModelError(msg)


def _refuse_by_adapters(model: Any) -> None:
    for name, settings in (getattr(model, "peft_config", None) or {}).items():
        if getattr(settings, "alora_invocation_tokens", None):
            msg = (
                f"its adapter {name!r} begins to act at certain tokens of a prompt (activated LoRA), which a chunk "
                "encoded alone does not have before it"
            )
            raise UnsupportedModelError(msg)
