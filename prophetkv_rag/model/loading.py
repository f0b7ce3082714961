"""Loading a model and its tokenizer: from a folder, a GGUF file, or under a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prophetkv_rag.errors import UnknownModelError
from prophetkv_rag.extras import needs
from prophetkv_rag.model.ambient import own_state
from prophetkv_rag.model.devices import device_of
from prophetkv_rag.model.gguf_files import gguf_in, repair_tokenizer


@own_state()
def load_model(
    name_or_path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: A folder in transformers' format, a `.gguf` file or a folder with one (needs the package `gguf`),
            or a hub name.
        dtype: Dtype to compute in; by default fp32 on a CPU (where half precision is slower) and the model's own
            elsewhere.
        device: By default (or `"auto"`) CUDA (or ROCm) if there is one, else the CPU. `"mps"` is Apple's GPU, which was
            never tried.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        UnknownModelError: If nothing can be loaded under that name, or only with Python code that comes with it, which
            is never run from here (nor asked about).
        InputError: If the device is not here.
        MissingExtraError: If it is a `.gguf` file and the packages that read one are not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = None if device is None else device_of(device)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = dtype if dtype is not None else torch.float32 if torch.device(device).type == "cpu" else "auto"
    path = gguf_in(Path(name_or_path)) or Path(name_or_path)
    source, extra = str(name_or_path), {}
    if path.suffix == ".gguf":
        source, extra = str(path.parent), {"gguf_file": path.name}
        with needs("gguf", "accelerate", "gguf", what="loading a .gguf file"):
            import accelerate  # noqa: F401  # transformers reads GGUF files only with both
            import gguf  # noqa: F401
    try:
        # Said, so that transformers does not ask on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **extra)
        if extra:
            repair_tokenizer(tokenizer, path)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, trust_remote_code=False, **extra)
    except Exception as error:  # also safetensors' own error, and RuntimeError for weights of another shape
        if "trust_remote_code" in str(error):
            raise _needs_code(str(name_or_path)) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        msg = (
            f"cannot load a model from {str(name_or_path)!r}: {reason}. Give a folder that holds config.json, weights "
            "and a tokenizer, a .gguf file, or the name of a model that is in the local hub cache"
        )
        raise UnknownModelError(msg) from error
    return model.to(device).eval(), tokenizer


def _needs_code(name: str) -> UnknownModelError:
    return UnknownModelError(
        f"cannot load a model from {name!r}: it needs Python code of its own, which is not run by itself. If you trust "
        f"that code, load it and make the engine from it: model = AutoModelForCausalLM.from_pretrained({name!r}, "
        f"trust_remote_code=True), tokenizer = AutoTokenizer.from_pretrained({name!r}, trust_remote_code=True), "
        "ProphetKVEngine(model, tokenizer). Otherwise give a model that transformers knows"
    )
