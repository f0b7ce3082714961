"""Telling models apart by their weights and tokenizers by their vocabularies, rather than by their names."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

# What may differ between two loads of the same model without changing a single key or value.
_VOLATILE_CONFIG = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "quantization_config",
}


_VOLATILE_ADAPTER_CONFIG = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}


_SAMPLES_PER_TENSOR = 64


_INTEGER_VIEW = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_fingerprint(model: Any) -> str:
    """Return 64 hex digits that change with any weight, adapter or configuration value that matters to K/V.

    Every tensor enters with its name, shape, dtype, the exact integer sum of its bits and a few sampled entries, so
    one pass at memory speed is enough and the result does not depend on threads or device. It says what the model is
    now: weights and adapters must not change while caches are made under it.
    """
    digest = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE_CONFIG}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            bits = flat.view(_INTEGER_VIEW[flat.element_size()]) if flat.dtype != torch.bool else flat
            total = int(bits.sum(dtype=torch.int64)) if flat.numel() else 0
            step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
            samples = bits[::step][:_SAMPLES_PER_TENSOR].cpu().numpy().tobytes()
            digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{total}|".encode() + samples)
    digest.update(_adapters(model).encode())
    return digest.hexdigest()


def _adapters(model: Any) -> str:
    """Return what decides how adapters change K/V besides their weights; "" for a model without any (see `peft`)."""
    settings = getattr(model, "peft_config", None)
    if not settings:
        return ""
    configs = {
        name: {key: value for key, value in config.to_dict().items() if key not in _VOLATILE_ADAPTER_CONFIG}
        for name, config in settings.items()
    }
    states = [
        [name, getattr(module, "active_adapters", None), getattr(module, "merged_adapters", None)]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "disable_adapters", None), bool) and not module.disable_adapters
    ]
    return json.dumps([configs, states], sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return 64 hex digits of the vocabulary and the special tokens; "" without a tokenizer.

    Of a tokenizer that does not tell its vocabulary, the name of its class and its size must do: caches are found by
    their token ids, and are never another text's.
    """
    if tokenizer is None:
        return ""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    try:
        vocabulary = tokenizer.get_vocab()
    except (AttributeError, NotImplementedError):
        vocabulary = {"": getattr(tokenizer, "vocab_size", 0)}
    for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], str(item[0]))):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    special = getattr(tokenizer, "special_tokens_map", None)
    digest.update(json.dumps(special, sort_keys=True, default=str).encode())
    return digest.hexdigest()
