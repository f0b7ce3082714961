"""Time to first token against full prefill (SDPA) on the same token ids, alternating in one process.

Absolute times mean little on a shared machine; the ratio of two neighbouring runs does. Peak memory is measured in a
process of its own per arm, since a process's peak never goes down.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from prophetkv_rag.attention import backbone
from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.evaluation.tasks.prompting import user_turn
from prophetkv_rag.prompt import Prompt
from prophetkv_rag.store.disk import DiskStore

QUESTION = "Answer from the speeches above in one sentence: how many planes shall be produced in 1942?"


@dataclass(slots=True)
class TtftResult:
    """One context length.

    `ratios` are full prefill's seconds over ours, pair by pair; `disk_overhead` is the extra time of loading every
    chunk from a warm disk, as a fraction of the time with caches in RAM.
    """

    context_tokens: int
    recompute_ratio: float
    full_s: list[float] = field(default_factory=list)
    ram_s: list[float] = field(default_factory=list)
    disk_s: list[float] = field(default_factory=list)
    stages_s: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Medians with their spread."""
        ratios = [full / ours for full, ours in zip(self.full_s, self.ram_s, strict=True)]
        disk = [full / ours for full, ours in zip(self.full_s, self.disk_s, strict=True)]
        return {
            "context_tokens": self.context_tokens,
            "recompute_ratio": self.recompute_ratio,
            "repeats": len(ratios),
            "full_prefill_s": statistics.median(self.full_s),
            "ram_s": statistics.median(self.ram_s),
            "disk_s": statistics.median(self.disk_s),
            "speedup_ram": statistics.median(ratios),
            "speedup_ram_min": min(ratios),
            "speedup_ram_max": max(ratios),
            "speedup_disk": statistics.median(disk),
            "disk_overhead": statistics.median([d / r - 1 for d, r in zip(self.disk_s, self.ram_s, strict=True)]),
            "stages_s": self.stages_s,
        }


def corpus_prompt(engine: ProphetKVEngine, context_tokens: int, chunk_tokens: int, *, skip: int = 0) -> Prompt:
    """Return a prompt of the shipped speeches, cut every `chunk_tokens` tokens, and a question.

    Real text, because what the question attends to decides the cost: on random tokens it picks late tokens, which see
    more keys than the average row. Speeches are repeated when they are too short.

    Args:
        engine: With a tokenizer.
        context_tokens: Tokens in all chunks together.
        chunk_tokens: Tokens per chunk.
        skip: Tokens of the corpus to leave out at the start.
    """
    folder = files("prophetkv_rag.demo_corpus") / "state-of-the-union"
    speeches = sorted(folder.iterdir(), key=lambda entry: entry.name)
    text = "\n\n".join(speech.read_text(encoding="utf-8") for speech in speeches if speech.name.endswith(".txt"))
    corpus: list[int] = engine.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    corpus = (corpus * (1 + (skip + context_tokens) // len(corpus)))[skip : skip + context_tokens]
    chunks = [corpus[start : start + chunk_tokens] for start in range(0, context_tokens, chunk_tokens)]
    head, tail = user_turn(engine.tokenizer, "", f"\n\n{QUESTION}")
    return Prompt(head, chunks, tail)


def measure_ttft(
    engine: ProphetKVEngine,
    *,
    context_tokens: int,
    chunk_tokens: int = 256,
    recompute_ratio: float = 0.2,
    strategy: str = "prophetkv",
    repeats: int = 5,
    on_step: Callable[[int], None] | None = None,
) -> TtftResult:
    """Alternate full prefill, reuse from RAM and from a warm disk on one prompt; `on_step(1)` after every round."""
    prompt = corpus_prompt(engine, context_tokens, chunk_tokens)
    result = TtftResult(context_tokens, recompute_ratio)
    with tempfile.TemporaryDirectory() as folder:
        # No RAM tier: every load reads, checks and decodes the files, which are in the page cache after the first.
        on_disk = ProphetKVEngine(
            engine.model,
            engine.tokenizer,
            config=ProphetKVConfig(encoding_prefix=engine.identity.prefix_ids),
            store=DiskStore(Path(folder), ram_bytes=0),
        )
        engine.add_chunks(prompt.chunks)
        on_disk.add_chunks(prompt.chunks)
        stages: list[dict[str, float]] = []
        for repeat in range(-1, repeats):  # the first round warms up
            full = engine.prefill(prompt, strategy="full_prefill").report
            ram = engine.prefill(prompt, strategy=strategy, recompute_ratio=recompute_ratio).report
            disk = on_disk.prefill(prompt, strategy=strategy, recompute_ratio=recompute_ratio).report
            if repeat >= 0:
                result.full_s.append(full.timings_s.ttft)
                result.ram_s.append(ram.timings_s.ttft)
                result.disk_s.append(disk.timings_s.ttft)
                stages.append({**ram.to_dict()["timings_s"], "load_disk": disk.timings_s.load})
            if on_step is not None:
                on_step(1)
        result.stages_s = {name: statistics.median(stage[name] for stage in stages) for name in stages[0]}
        on_disk.store.close()
    engine.store.delete(engine.identity.key(chunk) for chunk in prompt.chunks if not isinstance(chunk, str))
    return result


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
