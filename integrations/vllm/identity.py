"""Whose caches they are: the checkpoint's files, how vLLM holds them, the tokenizer and the encoding prefix.

vLLM's weights are fused and split, so the fingerprint that transformers' engine takes of a loaded model cannot be had
from them; it is taken from what they were read from.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.vllm.settings import ConnectorSettings
from prophetkv_rag.model import tokenizer_fingerprint
from prophetkv_rag.prompt import Tokens
from prophetkv_rag.store import CacheIdentity

logger = logging.getLogger(__name__)

_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
_SAMPLE_BYTES = 1024
_SAMPLES = 4
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def open_identity(vllm_config: Any, settings: ConnectorSettings) -> CacheIdentity:
    """Return what the caches of a vLLM engine depend on.

    Raises:
        InputError: If the checkpoint cannot be found on this machine.
    """
    model = vllm_config.model_config
    tokens = Tokens(None if model.skip_tokenizer_init else load_tokenizer(model))
    config = settings.engine_config()
    return CacheIdentity(
        settings.model_fingerprint or _fingerprint(model),
        tokenizer_fingerprint(tokens.tokenizer),
        tokens.encoding_prefix(config, max_lead_in_tokens=1),
        str(model.dtype).removeprefix("torch."),
        settings.namespace,
        "" if settings.placed.kind == "plain" else str(settings.placed),
    )


def opening_of(identity: CacheIdentity) -> CacheIdentity:
    """Return the identity of second caches: of chunks behind the opening alone, as if `encoding` were plain."""
    return replace(identity, encoding="")


def load_tokenizer(model: Any) -> Any:
    """Return the tokenizer of vLLM's model configuration, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )


def _fingerprint(model: Any) -> str:
    """Return 64 hex digits of configuration, quantisation and weights: of each tensor some bytes, spread over it."""
    directory = _checkpoint(model)
    digest = hashlib.sha256(b"vllm")
    config = {name: value for name, value in model.hf_config.to_dict().items() if name not in _VOLATILE}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(f"|{model.quantization}|{getattr(model, 'quantization_config', None)}|".encode())
    files = [directory] if directory.is_file() else sorted({f for kind in _WEIGHTS for f in directory.glob(kind)})
    if any(file.suffix == ".safetensors" for file in files):
        files = [file for file in files if file.suffix == ".safetensors"]
    if not files:
        msg = f"no weights found in {directory} ({', '.join(_WEIGHTS)}); serve a model whose files lie there"
        raise InputError(msg)
    for file in files:
        digest.update(f"{file.name}|{file.stat().st_size}|".encode())
        for part in _parts(file):
            digest.update(part)
    return digest.hexdigest()


def _checkpoint(model: Any) -> Path:
    if Path(model.model).exists():
        return Path(model.model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    except Exception as error:
        msg = f"the files of {model.model!r} are not on this machine: {error}; give a path, or download it first"
        raise InputError(msg) from error


def _parts(file: Path) -> Iterator[bytes]:
    with file.open("rb") as data:
        if file.suffix != ".safetensors":
            while part := data.read(1 << 24):
                yield part
            return
        size = int.from_bytes(data.read(8), "little")
        header = data.read(size)
        yield header
        for name, info in json.loads(header).items():
            if name == "__metadata__":
                continue
            start, stop = info["data_offsets"]
            for sample in range(_SAMPLES):
                data.seek(8 + size + start + max(0, stop - start - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                yield data.read(min(_SAMPLE_BYTES, stop - start))
