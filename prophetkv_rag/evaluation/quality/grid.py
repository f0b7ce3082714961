"""The quality grid: tasks x strategies x ratios on one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import ContextWindowError, InputError
from prophetkv_rag.evaluation.quality.fidelity import Arm, compare, full_prefill
from prophetkv_rag.evaluation.quality.metrics import score
from prophetkv_rag.evaluation.quality.results import FULL, QualityRow, ResultsFile
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.prompting import task_prompt
from prophetkv_rag.evaluation.tasks.surroundings import Surroundings
from prophetkv_rag.profile import CORPUS, PROMPT
from prophetkv_rag.prompt import Prompt


class Engines:
    """The engine as configured, and one per task and encoding; all run one model."""

    def __init__(self, default: ProphetKVEngine, surroundings: Mapping[str, Surroundings] | None = None) -> None:
        """Start from an engine that encodes chunks behind the chat template's opening."""
        self.default = default
        self.surroundings = surroundings or {}
        self._others: dict[tuple[str, str], ProphetKVEngine] = {}

    def of(self, arm: Arm, task: str) -> ProphetKVEngine:
        """Return the engine that holds an arm's caches.

        Raises:
            InputError: If the arm has an encoding and the task no example to spare for it.
        """
        if not arm.encoding:
            return self.default
        around = self._around(arm, task)
        if (task, arm.encoding) not in self._others:
            config = replace(
                self.default.config,
                prompt_template=f"{around.opening}{{context}}" if PROMPT in arm.encoding else None,
                lead_in=around.lead_in if CORPUS in arm.encoding else None,
            )
            engine = ProphetKVEngine(self.default.model, self.default.tokenizer, config=config)
            self._others[task, arm.encoding] = engine
        return self._others[task, arm.encoding]

    def _around(self, arm: Arm, task: str) -> Surroundings:
        if task not in self.surroundings:
            msg = f"{arm.strategy}: task {task!r} has no example to spare for {arm.encoding!r}; give fewer --rows"
            raise InputError(msg)
        around = self.surroundings[task]
        if CORPUS in arm.encoding and around.lead_in is None:
            msg = (
                f"{arm.strategy}: the example that task {task!r} has to spare holds no passage that no other has, so "
                "there is no lead-in; end a data file with a question whose passages are its own, give RULER a longer "
                "source text, or leave the strategy out"
            )
            raise InputError(msg)
        return around

    def inputs_of(self, arm: Arm, task: str, prompt: Prompt) -> str:
        """Return hex digits of all text that an arm's row comes from: the prompt, and what its chunks stand behind."""
        texts: list[Any] = [prompt.prefix, *prompt.chunks, prompt.suffix]
        if arm.encoding:
            around = self._around(arm, task)
            texts += [PROMPT in arm.encoding and around.opening, CORPUS in arm.encoding and around.lead_in]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


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
    used = {id(engine): engine for engine in (engines.of(arm, example.task) for arm in arms)}.values()
    keys = [(engine, engine.add_chunks(prompt.chunks, owner=owner)) for engine in used]

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
        for engine, own in keys:
            engine.remove_chunks(own, owner=owner)


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
) -> list[QualityRow]:
    """Measure what the results file lacks and return its rows of these examples.

    `on_step` is told first how many examples are there already, then 1 after each that was measured.
    """
    missing = {}
    for example in examples:
        prompt = task_prompt(example, engines.default.tokenizer, chunk_tokens)
        inputs = {arm: engines.inputs_of(arm, example.task, prompt) for arm in arms}
        if wanted_arms := results.missing(example, inputs):
            missing[example] = wanted_arms
    on_step(len(examples) - len(missing))
    for example, wanted_arms in missing.items():
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
