"""A corpus larger than the disk tier under a Zipf-shaped stream of questions: does the limit hold, do hits decay?

On a tiny random model, because only the store is looked at: hits, evictions and bytes do not depend on what the model
says. The chunks are random token ids.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.prompt import Prompt
from prophetkv_rag.store.catalog import Eviction
from prophetkv_rag.store.disk import DiskStore

_VOCABULARY = 4096


@dataclass(slots=True)
class StreamResult:
    """What happened, by windows of queries; `peak_nbytes` is the most that was ever seen on disk."""

    chunks: int
    limit: int
    peak_nbytes: int
    samples: int
    best_hit_rate: float
    eviction: str
    queries_per_window: int
    hit_rate: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def tiny_engine(store: DiskStore) -> ProphetKVEngine:
    """Return an engine on a random model whose caches take 8 KiB a token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=2048,
        )
        model = LlamaForCausalLM(settings)
    return ProphetKVEngine(model.float().eval(), None, config=ProphetKVConfig(encoding_prefix=(1,)), store=store)


def run_stream(
    *,
    chunks: int,
    limit: int,
    queries: int,
    chunk_tokens: int = 32,
    chunks_per_query: int = 4,
    exponent: float = 1.0,
    eviction: Eviction = "value",
    window: int = 100,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda steps: None,
) -> StreamResult:
    """Index a corpus into a store with a limit, and ask about chunks drawn by Zipf's law.

    Args:
        chunks: Chunks of the corpus.
        limit: Bytes on disk.
        queries: Questions asked.
        chunk_tokens: Tokens per chunk.
        chunks_per_query: Chunks per question.
        exponent: Of Zipf's law; larger is more uneven.
        eviction: See `DiskStore`.
        window: Queries per point of the result.
        seed: Of the stream.
        on_step: Called with 1 for every question.
    """
    generator = np.random.default_rng(seed)
    corpus = generator.integers(2, _VOCABULARY, (chunks, chunk_tokens)).tolist()
    weights = 1.0 / np.arange(1, chunks + 1) ** exponent
    weights = generator.permutation(weights / weights.sum())
    with tempfile.TemporaryDirectory() as folder:
        store = DiskStore(Path(folder), ram_bytes=0, max_bytes=limit, eviction=eviction)
        engine = tiny_engine(store)
        with _Watch(store) as watch:
            engine.add_chunks(corpus)
            nbytes = store.stats().nbytes
            per_blob = nbytes / max(1, store.stats().chunks)
            best = float(np.sort(weights)[::-1][: int(limit // per_blob)].sum())
            result = StreamResult(chunks, limit, 0, 0, best, eviction, window)
            hits: list[bool] = []
            times: list[float] = []
            for number in range(queries):
                picked = generator.choice(chunks, size=chunks_per_query, replace=False, p=weights)
                report = engine.prefill(Prompt([2, 3], [corpus[i] for i in picked], [4, 5])).report
                hits += [chunk.status == "hit" for chunk in report.chunks]
                times.append(report.timings_s.ttft)
                on_step(1)
                if (number + 1) % window == 0:
                    result.hit_rate.append(statistics.mean(hits))
                    result.ttft_ms.append(1e3 * statistics.median(times))
                    result.nbytes.append(store.stats().nbytes)
                    hits, times = [], []
            store.flush()
        result.peak_nbytes, result.samples = watch.peak, watch.samples
        store.close()
    return result


class _Watch:
    """Adds up all files on disk at every write, with the blob's own bytes, when nobody else can write or evict."""

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self._write = store.files.write
        self.peak = self.samples = 0

    def __enter__(self) -> _Watch:
        self._store.files.write = self._watched  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        self._store.files.write = self._write  # type: ignore[method-assign]

    def _watched(self, key: str, data: bytes) -> None:
        total = len(data) + sum(path.stat().st_size for path in self._store.files.all_files())
        self.peak, self.samples = max(self.peak, total), self.samples + 1
        self._write(key, data)


def plot_streams(results: list[StreamResult], path: Path) -> None:
    """Draw hit rate, TTFT and bytes over the stream."""
    from prophetkv_rag.evaluation.plotting import load_pyplot

    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for result in results:
        queries = [result.queries_per_window * (i + 1) for i in range(len(result.hit_rate))]
        axes[0].plot(queries, [100 * rate for rate in result.hit_rate], label=result.eviction)
        axes[1].plot(queries, result.ttft_ms, label=result.eviction)
        axes[2].plot(queries, [nbytes / 1e6 for nbytes in result.nbytes], label=result.eviction)
    axes[0].axhline(100 * results[0].best_hit_rate, color="black", linestyle="--", linewidth=1, label="best possible")
    axes[2].axhline(results[0].limit / 1e6, color="black", linestyle="--", linewidth=1, label="limit")
    axes[0].set(xlabel="queries", ylabel="chunks found, %", ylim=(0, 100))
    axes[1].set(xlabel="queries", ylabel="median time to first token, ms", ylim=(0, None))
    axes[2].set(xlabel="queries", ylabel="MB on disk", ylim=(0, 1.2 * results[0].limit / 1e6))
    for axis in axes:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
