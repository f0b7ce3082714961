"""How close a reused prefill is to full prefill: KL divergence over full prefill's own answer, teacher-forced.

Far less noisy than comparing answers: every position of the answer counts, and 50 questions say something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from prophetkv_rag.attention import complete_cache
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.evaluation.questions import Question, join_passages
from prophetkv_rag.prefill import PrefillResult

# The default question template of LlamaIndex's query engines, so that what is measured is what users run.
QUESTION_TEMPLATE = (
    "Context information is below.\n---------------------\n{context}\n---------------------\n"
    "Given the context information and not prior knowledge, answer the query.\nQuery: {question}\nAnswer: "
)


@dataclass(frozen=True, slots=True)
class Arm:
    """One thing to measure: a strategy at a ratio."""

    strategy: str
    recompute_ratio: float

    @property
    def label(self) -> str:
        """For tables."""
        return self.strategy if self.recompute_ratio == 0 else f"{self.strategy} {self.recompute_ratio:.0%}"


@dataclass(frozen=True, slots=True)
class FidelityRow:
    """One question, one arm."""

    id: str
    strategy: str
    recompute_ratio: float
    kl: float
    top1_agreement: float
    prompt_tokens: int
    recomputed_tokens: int
    ttft_s: float
    full_ttft_s: float


def measure_question(
    engine: ProphetKVEngine, question: Question, arms: Sequence[Arm], *, chunk_tokens: int, answer_tokens: int
) -> list[FidelityRow]:
    """Compare each arm with full prefill on one question.

    The answer is full prefill's greedy one, of up to `answer_tokens` tokens. KL(full || arm) is averaged over the
    answer's positions, the first token's included.
    """
    chunks = join_passages(question.passages, engine.tokenizer, chunk_tokens)
    keys = engine.add_chunks(chunks, owner="evaluation")
    content = QUESTION_TEMPLATE.format(context="\n\n".join(chunks), question=question.question)
    prompt = [{"role": "user", "content": content}]
    try:
        full = engine.prefill(prompt, strategy="full_prefill", query=question.question)
        answer, expected = _greedy_answer(engine, full, answer_tokens)
        rows = []
        for arm in arms:
            result = engine.prefill(
                prompt, strategy=arm.strategy, recompute_ratio=arm.recompute_ratio, query=question.question
            )
            actual = _forced(engine, result, answer)
            divergence = (expected.exp() * (expected - actual)).sum(dim=-1)
            rows.append(
                FidelityRow(
                    id=question.id,
                    strategy=arm.strategy,
                    recompute_ratio=arm.recompute_ratio,
                    kl=float(divergence.mean()),
                    top1_agreement=float((expected.argmax(-1) == actual.argmax(-1)).float().mean()),
                    prompt_tokens=result.report.prompt_tokens,
                    recomputed_tokens=result.report.recomputed_tokens,
                    ttft_s=result.report.timings_s.ttft,
                    full_ttft_s=full.report.timings_s.ttft,
                )
            )
        return rows
    finally:
        engine.remove_chunks(keys, owner="evaluation")


@torch.no_grad()
def _greedy_answer(engine: ProphetKVEngine, full: PrefillResult, answer_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Return full prefill's greedy answer and its log-probabilities `[answer, vocab]`, in float64."""
    logits, answer, rows = full.logits, list[int](), []
    cache = complete_cache(full.past_key_values)
    while True:
        rows.append(torch.log_softmax(logits[0].double(), dim=-1))
        token = int(logits.argmax(-1))
        answer.append(token)
        if token in engine.end_tokens or len(answer) >= answer_tokens:
            return answer, torch.stack(rows)
        step = torch.tensor([[token]], device=full.input_ids.device)
        logits = engine.model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]


@torch.no_grad()
def _forced(engine: ProphetKVEngine, result: PrefillResult, answer: Sequence[int]) -> torch.Tensor:
    """Return log-probabilities `[answer, vocab]` of the answer's positions from another cache."""
    first = torch.log_softmax(result.logits.double(), dim=-1)
    if len(answer) == 1:
        return first
    forced = torch.tensor([list(answer[:-1])], device=result.input_ids.device)
    cache = complete_cache(result.past_key_values)
    logits = engine.model(input_ids=forced, past_key_values=cache, use_cache=True).logits[0]
    return torch.cat([first, torch.log_softmax(logits.double(), dim=-1)])


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with a 95% bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float], *, samples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of `values` with a 95% percentile-bootstrap interval."""
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(data), size=(samples, len(data)))
    low, high = np.quantile(data[draws].mean(axis=1), [0.025, 0.975])
    return Interval(float(data.mean()), float(low), float(high))


def summarise(rows: Sequence[FidelityRow], *, against: str = "prophetkv") -> list[dict[str, Any]]:
    """Return one entry per arm: KL, agreement and speed, and the paired difference in KL to `against`'s arms."""
    arms = list(dict.fromkeys(Arm(row.strategy, row.recompute_ratio) for row in rows))
    by_arm = {arm: {r.id: r for r in rows if Arm(r.strategy, r.recompute_ratio) == arm} for arm in arms}
    reference = next((arm for arm in arms if arm.strategy == against), None)
    table = []
    for arm, found in by_arm.items():
        entry: dict[str, Any] = {
            "strategy": arm.strategy,
            "recompute_ratio": arm.recompute_ratio,
            "questions": len(found),
            "kl": asdict(bootstrap_mean([row.kl for row in found.values()])),
            "top1_agreement": float(np.mean([row.top1_agreement for row in found.values()])),
            "ttft_ratio": float(np.median([row.full_ttft_s / row.ttft_s for row in found.values()])),
        }
        if reference is not None and arm != reference:
            shared = [(row.kl, by_arm[reference][row.id].kl) for row in found.values() if row.id in by_arm[reference]]
            entry["kl_above_reference"] = asdict(bootstrap_mean([own - other for own, other in shared]))
            entry["reference"] = reference.label
        table.append(entry)
    return table


def measure(
    engine: ProphetKVEngine,
    questions: Sequence[Question],
    arms: Sequence[Arm],
    *,
    chunk_tokens: int = 256,
    answer_tokens: int = 24,
    on_step: Callable[[int], None] | None = None,
) -> list[FidelityRow]:
    """Measure all questions; `on_step(1)` is called after each."""
    rows: list[FidelityRow] = []
    for question in questions:
        rows.extend(measure_question(engine, question, arms, chunk_tokens=chunk_tokens, answer_tokens=answer_tokens))
        if on_step is not None:
            on_step(1)
    return rows
