"""The quality grid: tasks x strategies x ratios on one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from prophetkv_rag.errors import ContextWindowError, InputError
from prophetkv_rag.evaluation.quality.engines import Engines
from prophetkv_rag.evaluation.quality.fidelity import Arm, compare, full_prefill
from prophetkv_rag.evaluation.quality.metrics import score
from prophetkv_rag.evaluation.quality.results import FULL, QualityRow, ResultsFile
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.prompting import task_prompt


def measure_example(
    engines: Engines,
    example: TaskExample,
    arms: Sequence[Arm],
    *,
    chunk_tokens: int,
    answer_tokens: int,
    score_tokens: int | None = None,
) -> list[QualityRow]:
    """Compare every arm with full prefill on one example.

    Full prefill and the chunks' caches are computed once and shared by the arms. KL and agreement are over the first
    `answer_tokens` of full prefill's answer; answers are scored as long as the task allows, or `score_tokens`.

    Raises:
        InputError: If the prompt is longer than the model's context window.
    """
    tokenizer = engines.default.tokenizer
    prompt = task_prompt(example, tokenizer, chunk_tokens)
    compared = min(answer_tokens, example.max_new_tokens)
    scored = min(score_tokens or example.max_new_tokens, example.max_new_tokens)
    try:
        truth = full_prefill(engines.default, prompt, answer_tokens=compared, score_tokens=scored)
    except ContextWindowError as error:
        msg = f"{example.task}, example {example.example_id}: {error}; give a shorter --length"
        raise InputError(msg) from error
    owner = f"quality {example.task} {example.example_id}"
    forget = engines.add_chunks(arms, example.task, [str(chunk) for chunk in prompt.chunks], owner=owner)

    def row(arm: Arm, report: Any, **found: Any) -> QualityRow:
        answer = tokenizer.decode(found.pop("answer"), skip_special_tokens=True)
        if example.stop_at_newline:
            answer = answer.lstrip("\n").split("\n")[0]
        return QualityRow(
            task=example.task,
            example_id=example.example_id,
            strategy=arm.strategy,
            recompute_ratio=arm.recompute_ratio,
            charged_ratio=round(report.charged_ratio, 5),
            score=score(example, answer),
            prompt_tokens=report.prompt_tokens,
            chunk_tokens=report.chunk_tokens,
            recomputed_tokens=report.recomputed_tokens,
            ttft_s=round(report.timings_s.ttft, 4),
            answer=answer,
            inputs=engines.inputs_of(arm, example.task, prompt),
            **found,
        )

    try:
        whole = {"kl": 0.0, "top1_agreement": 1.0, "attended_recall": 1.0}
        rows = [row(Arm(FULL, 1.0), truth.result.report, answer=truth.whole_answer, **whole)]
        for arm in arms:
            result = engines.of(arm, example.task).prefill(
                prompt, strategy=arm.spec, recompute_ratio=arm.recompute_ratio
            )
            found = compare(engines.default, truth, result, score_tokens=scored)
            rows.append(row(arm, result.report, **asdict(found)))
        return rows
    finally:
        forget()


def run_grid(
    engines: Engines,
    examples: Sequence[TaskExample],
    arms: Sequence[Arm],
    results: ResultsFile,
    *,
    chunk_tokens: int,
    answer_tokens: int,
    score_tokens: int | None = None,
    on_step: Callable[[int], None] = lambda steps: None,
    is_over: Callable[[], bool] = lambda: False,
) -> list[QualityRow]:
    """Measure what the results file lacks and return its rows of these examples.

    `on_step` is told first how many examples are there already, then 1 after each that was measured; `is_over` is asked
    before each whether to leave it and all later ones out.
    """
    missing = {}
    for example in examples:
        prompt = task_prompt(example, engines.default.tokenizer, chunk_tokens)
        inputs = {arm: engines.inputs_of(arm, example.task, prompt) for arm in arms}
        if wanted_arms := results.missing(example, inputs):
            missing[example] = wanted_arms
    on_step(len(examples) - len(missing))
    for example, wanted_arms in missing.items():
        if is_over():
            break
        rows = measure_example(
            engines,
            example,
            wanted_arms,
            chunk_tokens=chunk_tokens,
            answer_tokens=answer_tokens,
            score_tokens=score_tokens,
        )
        results.append(rows)
        on_step(1)
    wanted = {(example.task, example.example_id) for example in examples}
    return [row for row in results.rows if (row.task, row.example_id) in wanted]
