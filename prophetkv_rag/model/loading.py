"""Loading a local model, and telling one model from another by its weights rather than by its name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from prophetkv_rag.errors import UnknownModelError

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


def load_model(
    name_or_path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: A folder in transformers' format, a `.gguf` file (needs the package `gguf`), or a hub name.
        dtype: Dtype to compute in; by default fp32 on a CPU (where half precision is slower) and the model's own
            elsewhere.
        device: By default CUDA (or ROCm) if there is one, else the CPU.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        UnknownModelError: If nothing can be loaded under that name.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = dtype if dtype is not None else torch.float32 if torch.device(device).type == "cpu" else "auto"
    path = Path(name_or_path)
    source, extra = str(name_or_path), {}
    if path.suffix == ".gguf":
        source, extra = str(path.parent), {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, **extra)
    except Exception as error:  # also safetensors' own error, and RuntimeError for weights of another shape
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        msg = (
            f"cannot load a model from {str(name_or_path)!r}: {reason}. Give a folder that holds config.json, weights "
            "and a tokenizer, a .gguf file, or the name of a model that is in the local hub cache"
        )
        raise UnknownModelError(msg) from error
    return model.to(device).eval(), tokenizer


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
    """Return 64 hex digits of the vocabulary and the special tokens; "" without a tokenizer."""
    if tokenizer is None:
        return ""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    digest.update(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    return digest.hexdigest()


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
