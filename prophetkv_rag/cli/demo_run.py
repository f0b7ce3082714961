"""The demo's questions, each answered twice: from reused caches and by full prefill of the same prompt."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prophetkv_rag.cli.answering import Answer, answer_question
from prophetkv_rag.config import ALONE_RATIO, BEHIND_RATIO
from prophetkv_rag.defaults import DemoQuestion

if TYPE_CHECKING:
    from prophetkv_rag.cli.database import Database

VERSIONS = ("prophetkv-rag", "torch", "transformers", "llama-index-core", "chromadb")


@dataclass(frozen=True, slots=True)
class DemoRun:
    """One question and its two answers."""

    question: str
    expected: tuple[str, ...]
    reused: Answer
    full: Answer

    @property
    def speedup(self) -> float:
        """How many times sooner the first token comes with reused caches."""
        if self.reused.report is None or self.full.report is None:
            return float("nan")
        return self.full.report.timings_s.ttft / self.reused.report.timings_s.ttft

    def is_right(self, answer: Answer) -> bool:
        """Whether an expected text is in the answer, whatever the case."""
        return any(text.lower() in answer.text.lower() for text in self.expected)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "question": self.question,
            "expected": list(self.expected),
            "prophetkv": self.reused.to_dict() | {"is_right": self.is_right(self.reused)},
            "full_prefill": self.full.to_dict() | {"is_right": self.is_right(self.full)},
            "ttft_ratio": self.speedup,
        }


def run_questions(
    database: Database, questions: Sequence[DemoQuestion], *, top_k: int, max_new_tokens: int
) -> list[DemoRun]:
    """Answer every question twice; retrieval is the same, and so is the prompt."""
    runs = []
    for entry in questions:
        reused, full = (
            answer_question(
                database,
                entry.question,
                top_k=top_k,
                max_new_tokens=max_new_tokens,
                strategy=strategy,
                remember=False,  # each question is measured by itself
            )
            for strategy in ("prophetkv", "full_prefill")
        )
        runs.append(DemoRun(entry.question, entry.expected, reused, full))
    return runs


def conditions(database: Database, indexing: dict[str, Any]) -> dict[str, str]:
    """What the numbers depend on, in words."""
    import torch

    from prophetkv_rag.defaults import read_source

    engine = database.own_engine
    model = database.settings.model
    caches = indexing["caches"]
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads{_load()}",
        "model": f"{Path(model).name}, {engine.identity.dtype} on {engine.model.device}",
        "model_source": read_source(Path(model)) or model,
        "strategy": f"{engine.config.strategy}, {_ratio(engine.config.recompute_ratio)}; full prefill with "
        f"{engine.model.config._attn_implementation} attention on the same token ids",
        "corpus": f"{indexing['total_chunks']} chunks, {caches['tokens']:,} tokens, of State of the Union addresses",
        "versions": ", ".join(f"{name} {_version(name)}" for name in VERSIONS),
    }


def _ratio(ratio: float | None) -> str:
    if ratio is not None:
        return f"{ratio:.0%} recomputed"
    return f"{BEHIND_RATIO:.0%} recomputed of chunks encoded behind others and {ALONE_RATIO:.0%} of those alone"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "?"


def _load() -> str:
    """How busy the machine is: timings on a shared one say little."""
    return f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
