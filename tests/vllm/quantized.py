"""A quantised checkpoint made here: 8-bit weights with a scale a row, 8-bit activations, as `compressed-tensors`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**_EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
}


def quantize(model: Path) -> Path:
    """Quantise a saved model's linear layers in place."""
    file = model / "model.safetensors"
    tensors = {}
    for name, weight in load_file(file).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return model
