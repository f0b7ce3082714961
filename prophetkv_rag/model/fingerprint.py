"""Telling models apart by their weights and tokenizers by their vocabularies, rather than by their names."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from typing import Any

import torch

from prophetkv_rag.errors import UnsupportedModelError
from prophetkv_rag.model.ambient import own_state
from prophetkv_rag.model.tensor_parts import parts_of

logger = logging.getLogger(__name__)

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


_COMPILED = "_orig_mod."  # what `torch.compile` puts into the names of what it wraps


_SAMPLES_PER_TENSOR = 64


_INTEGER_VIEW = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@own_state()
def model_fingerprint(model: Any) -> str:
    """Return 64 hex digits that change with any weight, adapter or configuration value that matters to K/V.

    Every tensor enters with its name, shape, dtype, the exact integer sum of its bits and a few sampled entries, so
    one pass at memory speed is enough and the result does not depend on threads or device. Packed weights enter part
    by part (`tensor_parts.py`). What `torch.compile` wraps is the same model. It says what the model is now:
    `ModelState` notices what changes later.

    Raises:
        UnsupportedModelError: If a weight is not in memory, or does not tell what it holds.
    """
    digest = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE_CONFIG}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(_held(model).items()):
        for part, held in parts_of(name, value):
            digest.update(f"{part}|{held}|".encode() if isinstance(held, str) else _summary(part, held))
    digest.update(_adapters(model).encode())
    return digest.hexdigest()


def _held(model: Any) -> dict[str, Any]:
    """Return what `state_dict` holds, by name, without touching the model.

    Modules that save themselves in a way of their own may change in doing so (bitsandbytes unpacks what it packed for a
    CPU, and does not get the same back), so a copy of those is asked.
    """
    held: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        saver = module
        if type(module)._save_to_state_dict is not torch.nn.Module._save_to_state_dict:
            try:
                saver = copy.deepcopy(module)
            except Exception:
                logger.debug("module %s cannot be copied and saves itself", name, exc_info=True)
        try:
            saver._save_to_state_dict(held, f"{name}." if name else "", False)
        except NotImplementedError as error:
            msg = f"its part {name} ({type(module).__name__}) does not tell what it holds: {error}"
            raise UnsupportedModelError(msg) from error
    return {name.replace(_COMPILED, ""): value for name, value in held.items()}


def _summary(name: str, tensor: torch.Tensor) -> bytes:
    flat = tensor.reshape(-1)
    bits = flat.view(_INTEGER_VIEW[flat.element_size()]) if flat.dtype != torch.bool else flat
    total = int(bits.sum(dtype=torch.int64)) if flat.numel() else 0
    step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
    samples: bytes = bits[::step][:_SAMPLES_PER_TENSOR].cpu().numpy().tobytes()
    return f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{total}|".encode() + samples


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
        [
            name.replace(_COMPILED, ""),
            getattr(module, "active_adapters", None),
            getattr(module, "merged_adapters", None),
        ]
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
