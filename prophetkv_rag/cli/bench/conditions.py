"""What every measurement tells about its conditions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def conditions_of(engine: Any, model: str) -> dict[str, Any]:
    """Return what a measurement depends on besides its own options."""
    import torch

    from prophetkv_rag.kernels import ops

    return {
        "model": Path(model).name,
        "dtype": engine.support.dtype,
        "device": str(engine.model.device),
        "kernels": ops.in_use(engine.model.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "prophetkv_rag": version("prophetkv-rag"),
    }
