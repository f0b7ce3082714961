"""The quality grid: tasks x strategies x ratios on one model, kept row by row in a file that a later run extends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import ContextWindowError, InputError
from prophetkv_rag.evaluation.fidelity import Arm, compare, full_prefill
from prophetkv_rag.evaluation.metrics import score
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.loading import Surroundings
from prophetkv_rag.evaluation.tasks.prompting import task_prompt
from prophetkv_rag.profile import CORPUS, PROMPT

FULL = "full_prefill"


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One example, one arm; full prefill has a row of its own (`strategy` `"full_prefill"`, `kl` 0).

    `charged_ratio` is the budget really spent (`ReuseReport.charged_ratio`); `score` is the task's official metric on
    the arm's greedy answer.
    """

    task: str
    example_id: str
    strategy: str
    recompute_ratio: float
    charged_ratio: float
    kl: float
    top1_agreement: float
    attended_recall: float | None
    score: float
    prompt_tokens: int
    chunk_tokens: int
    recomputed_tokens: int
    ttft_s: float
    answer: str


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
        if task not in self.surroundings:
            msg = f"{arm.strategy}: task {task!r} has no example to spare for {arm.encoding!r}; give fewer --rows"
            raise InputError(msg)
        if (task, arm.encoding) not in self._others:
            around = self.surroundings[task]
            config = replace(
                self.default.config,
                prompt_template=f"{around.opening}{{context}}" if PROMPT in arm.encoding else None,
                lead_in=around.lead_in if CORPUS in arm.encoding else None,
            )
            engine = ProphetKVEngine(self.default.model, self.default.tokenizer, config=config)
            self._others[task, arm.encoding] = engine
        return self._others[task, arm.encoding]


def measure_example(
    engines: Engines, example: TaskExample, arms: Sequence[Arm], *, chunk_tokens: int, answer_tokens: int
) -> list[QualityRow]:
    """Compare every arm with full prefill on one example.

    Full prefill and the chunks' caches are computed once and shared by the arms.

    Raises:
        InputError: If the prompt is longer than the model's context window.
    """
    tokenizer = engines.default.tokenizer
    prompt = task_prompt(example, tokenizer, chunk_tokens)
    limit = min(answer_tokens, example.max_new_tokens)
    try:
        truth = full_prefill(engines.default, prompt, answer_tokens=limit)
    except ContextWindowError as error:
        msg = f"{example.task}, example {example.example_id}: {error}; give a shorter --length"
        raise InputError(msg) from error
    owner = f"quality {example.task} {example.example_id}"
    used = {id(engine): engine for engine in (engines.of(arm, example.task) for arm in arms)}.values()
    keys = [(engine, engine.add_chunks(prompt.chunks, owner=owner)) for engine in used]

    def row(arm: Arm, report: Any, **found: Any) -> QualityRow:
        answer = tokenizer.decode(found.pop("answer"), skip_special_tokens=True)
        if example.stop_at_newline:
            answer = answer.split("\n")[0]
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
            **found,
        )

    try:
        whole = {"kl": 0.0, "top1_agreement": 1.0, "attended_recall": 1.0}
        rows = [row(Arm(FULL, 1.0), truth.result.report, answer=truth.answer, **whole)]
        for arm in arms:
            result = engines.of(arm, example.task).prefill(
                prompt, strategy=arm.spec, recompute_ratio=arm.recompute_ratio
            )
            found = compare(engines.default, truth, result, answer_tokens=limit)
            rows.append(row(arm, result.report, **asdict(found)))
        return rows
    finally:
        for engine, own in keys:
            engine.remove_chunks(own, owner=owner)


class ResultsFile:
    """A JSON-lines file of rows behind one line that says under which conditions they were measured.

    An example's rows are appended together, in one write, when all its arms are done: an interrupted run loses the
    example under way and nothing else.
    """

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        """Open or start the file.

        Raises:
            InputError: If it exists and holds rows measured under other conditions, is not such a file, or cannot be
                written.
        """
        self.path = path
        self.rows: list[QualityRow] = []
        try:
            self._open(path, conditions)
        except OSError as error:
            msg = f"{path} cannot be used for results: {error.strerror or error}; give another file"
            raise InputError(msg) from error

    def _open(self, path: Path, conditions: dict[str, Any]) -> None:
        if path.exists() and path.stat().st_size:
            before, self.rows = read_results(path)
            changed = sorted(key for key in {*before, *conditions} if before.get(key) != conditions.get(key))
            if changed:
                msg = (
                    f"{path} was measured under other conditions ({', '.join(changed)}); give another --out, or the "
                    "options it was made with"
                )
                raise InputError(msg)
            _drop_torn_line(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"conditions": conditions}) + "\n", encoding="utf-8")

    def missing(self, example: TaskExample, arms: Iterable[Arm]) -> list[Arm]:
        """Return the arms that have no row of this example yet."""
        done = {
            (row.strategy, row.recompute_ratio)
            for row in self.rows
            if (row.task, row.example_id) == (example.task, example.example_id)
        }
        return [arm for arm in arms if (arm.strategy, arm.recompute_ratio) not in done]

    def append(self, rows: Sequence[QualityRow]) -> None:
        """Add rows; full prefill's only once per example."""
        known = {(row.task, row.example_id) for row in self.rows if row.strategy == FULL}
        rows = [row for row in rows if row.strategy != FULL or (row.task, row.example_id) not in known]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))
            file.flush()
        self.rows.extend(rows)


def read_results(path: Path) -> tuple[dict[str, Any], list[QualityRow]]:
    """Read a results file; a last line that was cut off is left out.

    Raises:
        InputError: If it is not a results file.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        conditions = json.loads(lines[0])["conditions"]
        rows = [QualityRow(**json.loads(line)) for line in lines[1:-1] if line]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path} is not a results file of `bench quality` ({type(error).__name__}: {error}); give another --out"
        raise InputError(msg) from error
    return conditions, rows


def _drop_torn_line(path: Path) -> None:
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def run_grid(
    engines: Engines,
    examples: Sequence[TaskExample],
    arms: Sequence[Arm],
    results: ResultsFile,
    *,
    chunk_tokens: int,
    answer_tokens: int,
    on_step: Callable[[int], None] | None = None,
) -> list[QualityRow]:
    """Measure what the results file lacks and return its rows of these examples; `on_step(1)` after each example."""
    for example in examples:
        missing = results.missing(example, arms)
        if missing:
            results.append(
                measure_example(engines, example, missing, chunk_tokens=chunk_tokens, answer_tokens=answer_tokens)
            )
        if on_step is not None:
            on_step(1)
    wanted = {(example.task, example.example_id) for example in examples}
    return [row for row in results.rows if (row.task, row.example_id) in wanted]
