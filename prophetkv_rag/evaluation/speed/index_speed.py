"""Indexing against the model's raw batched prefill of the same chunks."""

from __future__ import annotations

import statistics
import time

import torch

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.evaluation.speed.ttft import corpus_prompt
from prophetkv_rag.model import backbone


def measure_index_throughput(
    engine: ProphetKVEngine, *, num_chunks: int = 16, chunk_tokens: int = 256, repeats: int = 3
) -> dict[str, float]:
    """Compare `add_chunks` with the model's raw batched prefill (no cache kept) of the same chunks, alternating."""
    chunks = list(corpus_prompt(engine, num_chunks * chunk_tokens, chunk_tokens, skip=999).chunks)
    batch = max(1, engine.config.index_batch_tokens // chunk_tokens)
    ids = torch.tensor([list(map(int, chunk)) for chunk in chunks], device=engine.model.device)
    raw, encoded = [], []
    for repeat in range(-1, repeats):
        started = time.perf_counter()
        with torch.no_grad():
            for start in range(0, num_chunks, batch):
                backbone(engine.model)(input_ids=ids[start : start + batch], use_cache=True)
        raw_seconds = time.perf_counter() - started
        engine.store.delete([engine.identity.key(list(map(int, chunk))) for chunk in chunks])
        started = time.perf_counter()
        engine.add_chunks(chunks)
        if repeat >= 0:
            raw.append(raw_seconds)
            encoded.append(time.perf_counter() - started)
    engine.store.delete([engine.identity.key(list(map(int, chunk))) for chunk in chunks])
    tokens = num_chunks * chunk_tokens
    return {
        "raw_tokens_per_s": tokens / statistics.median(raw),
        "index_tokens_per_s": tokens / statistics.median(encoded),
        "share_of_raw": statistics.median([r / e for r, e in zip(raw, encoded, strict=True)]),
    }
