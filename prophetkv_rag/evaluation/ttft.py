"""Time to first token against full prefill (SDPA) on the same token ids, alternating in one process.

Absolute times mean little on a shared machine; the ratio of two neighbouring runs does. Peak memory is measured in a
process of its own per arm, since a process's peak never goes down (`memory.py`).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.evaluation.fidelity import Arm
from prophetkv_rag.evaluation.flops import arithmetic_limit
from prophetkv_rag.evaluation.tasks.prompting import user_turn
from prophetkv_rag.evaluation.ttft_peers import PEERS, decode_seconds
from prophetkv_rag.prompt import Prompt
from prophetkv_rag.store.disk import DiskStore

QUESTION = "Answer from the speeches above in one sentence: how many planes shall be produced in 1942?"


@dataclass(slots=True)
class TtftResult:
    """One strategy at one ratio and context length; every list has an entry per round.

    Attributes:
        context_tokens: Tokens in the chunks.
        strategy: As `make_strategy` reads it.
        recompute_ratio: Fraction of the chunk tokens recomputed.
        limit: Full prefill's arithmetic over this one's: how many times sooner it could be at most (`flops.py`).
        mean_position: Where the recomputed tokens stand on average, as a fraction of the prompt; 0 if there are none.
        full_s: Full prefill's seconds.
        ram_s: Seconds with caches in RAM.
        disk_s: Seconds with every cache loaded from a warm disk (page cache), checked and decoded.
        decode_ratio: Seconds of decoding after full prefill over those after this one.
        stages_s: Where the time goes, caches in RAM; `load_disk` is loading from the warm disk.
    """

    context_tokens: int
    strategy: str
    recompute_ratio: float
    limit: float = 0.0
    mean_position: float = 0.0
    full_s: list[float] = field(default_factory=list)
    ram_s: list[float] = field(default_factory=list)
    disk_s: list[float] = field(default_factory=list)
    decode_ratio: list[float] = field(default_factory=list)
    stages_s: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Medians with their spread; `speedup_...` are full prefill's seconds over ours, pair by pair."""
        ratios = [full / ours for full, ours in zip(self.full_s, self.ram_s, strict=True)]
        disk = [full / ours for full, ours in zip(self.full_s, self.disk_s, strict=True)]
        return {
            "context_tokens": self.context_tokens,
            "strategy": self.strategy,
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
            "limit": self.limit,
            "mean_position": self.mean_position,
            "share_of_limit": statistics.median(ratios) / self.limit,
            "decode_ratio": statistics.median(self.decode_ratio),
            "stages_s": {name: statistics.median(stage[name] for stage in self.stages_s) for name in self.stages_s[0]},
        }


@dataclass(slots=True)
class PeerResult:
    """Another way to the first token, on the same prompt; `ratios` are full prefill's seconds over its own."""

    context_tokens: int
    peer: str
    ratios: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Median with its spread."""
        return {
            "context_tokens": self.context_tokens,
            "peer": self.peer,
            "speedup": statistics.median(self.ratios),
            "speedup_min": min(self.ratios),
            "speedup_max": max(self.ratios),
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
    arms: Sequence[Arm],
    *,
    context_tokens: int,
    chunk_tokens: int = 256,
    repeats: int = 5,
    peers: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> tuple[list[TtftResult], list[PeerResult]]:
    """Alternate full prefill, every arm from RAM and from a warm disk, and the peers, on one prompt.

    Every time is compared with the full prefill of its own round; the first round warms up. `on_step(1)` after each.
    """
    prompt = corpus_prompt(engine, context_tokens, chunk_tokens)
    layout = engine.read(prompt)
    results = [TtftResult(context_tokens, arm.strategy, arm.recompute_ratio) for arm in arms]
    others = {make.name: (make(engine, prompt), PeerResult(context_tokens, make.name)) for make in PEERS if peers}
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
        for repeat in range(-1, repeats):
            full = engine.prefill(prompt, strategy="full_prefill")
            full_s, full_decode = full.report.timings_s.ttft, decode_seconds(engine, full)
            del full
            for arm, result in zip(arms, results, strict=True):
                ram = engine.prefill(prompt, strategy=arm.strategy, recompute_ratio=arm.recompute_ratio)
                decode = decode_seconds(engine, ram)
                disk = on_disk.prefill(prompt, strategy=arm.strategy, recompute_ratio=arm.recompute_ratio).report
                if repeat >= 0:
                    result.limit = arithmetic_limit(engine.model, engine.support, layout, ram.recomputed)
                    if ram.recomputed.numel():
                        result.mean_position = float(ram.recomputed.float().mean()) / layout.num_tokens
                    result.full_s.append(full_s)
                    result.ram_s.append(ram.report.timings_s.ttft)
                    result.disk_s.append(disk.timings_s.ttft)
                    result.decode_ratio.append(full_decode / decode)
                    stages = ram.report.to_dict()["timings_s"]
                    result.stages_s.append({**stages, "load_disk": disk.timings_s.load})
            for peer, found in others.values():
                seconds = peer.seconds()
                if repeat >= 0:
                    found.ratios.append(full_s / seconds)
            if on_step is not None:
                on_step(1)
        on_disk.store.close()
    engine.store.delete(engine.identity.key(chunk) for chunk in prompt.chunks if not isinstance(chunk, str))
    return results, [found for _, found in others.values()]
