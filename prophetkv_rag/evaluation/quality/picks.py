"""Which tokens each strategy recomputes on one prompt, so that crowding-out can be seen."""

from __future__ import annotations

from collections.abc import Sequence

from prophetkv_rag.evaluation.quality.engines import Engines
from prophetkv_rag.evaluation.quality.fidelity import Arm, full_prefill
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.prompting import task_prompt

YARDSTICK = "full prefill attends to"


def picks_of(
    engines: Engines, example: TaskExample, arms: Sequence[Arm], *, chunk_tokens: int
) -> tuple[dict[str, list[int]], list[tuple[int, int]]]:
    """Return the recomputed positions per arm, behind the tokens that full prefill attends to most, and chunk spans.

    The yardstick holds as many tokens as the arms' largest ratio allows. Arms that recompute nothing are left out.
    """
    engine = engines.default
    prompt = task_prompt(example, engine.tokenizer, chunk_tokens)
    truth = full_prefill(engine, prompt, answer_tokens=1)
    results = {
        arm.label: engines.of(arm, example.task).prefill(prompt, strategy=arm.spec, recompute_ratio=arm.recompute_ratio)
        for arm in arms
        if arm.recompute_ratio > 0
    }
    spans = [(chunk.start, chunk.stop) for chunk in engine.read(prompt).chunks]
    count = int(max((arm.recompute_ratio for arm in arms), default=0.2) * sum(stop - start for start, stop in spans))
    picks = {YARDSTICK: sorted(truth.attention.topk(count).indices.tolist())}
    picks |= {label: result.recomputed.tolist() for label, result in results.items()}
    return picks, spans
