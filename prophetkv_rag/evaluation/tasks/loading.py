"""Task names and files to examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile, zip_longest
from pathlib import Path
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.longbench import (
    LONGBENCH_E_TASKS,
    LONGBENCH_TASKS,
    load_longbench,
    truncate_example,
)
from prophetkv_rag.evaluation.tasks.own_data import load_questions
from prophetkv_rag.evaluation.tasks.prompting import join_pieces, prompt_length, task_prompt
from prophetkv_rag.evaluation.tasks.ruler import RULER_TASKS, Sources, generate

_LONGBENCH = "longbench_"
LEAD_IN_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a task's chunks may be encoded behind, for the arms that ask for it.

    Attributes:
        lead_in: Text of the same kind as the contexts that no measured example holds: the last whole chunk of
            `LEAD_IN_TOKENS` of the spare example's context.
        opening: What the task's prompts begin with before the context, chat template included: what the spare and the
            first measured example share (few-shot examples that change from row to row are not part of it).
    """

    lead_in: str
    opening: str


def task_names() -> tuple[str, ...]:
    """Return the names that `load_examples` knows."""
    return (*RULER_TASKS, *(f"{_LONGBENCH}{name}" for name in (*LONGBENCH_TASKS, *LONGBENCH_E_TASKS)))


def load_examples(
    tasks: Sequence[str],
    data: Sequence[Path],
    *,
    tokenizer: Any,
    rows: int,
    length: int,
    chunk_tokens: int,
    seed: int = 42,
    sources: Sources | None = None,
    longbench: Path | None = None,
) -> tuple[list[TaskExample], dict[str, Surroundings]]:
    """Return `rows` examples of every task and data file, and per task its `Surroundings`, from one example more.

    The examples are interleaved, so that a run cut short has some of each task. The example to spare is the same
    whatever the number of rows: of a data file or LongBench the last one, unless it is measured (the task then has no
    surroundings), of RULER one of twice the length and another seed.

    Args:
        tasks: Names of tasks (`task_names`).
        data: Question files of the user's own; each becomes a task of the file's name.
        tokenizer: Measures prompts.
        rows: Examples per task.
        length: RULER prompts are made to fit this many tokens, the answer included; LongBench's are cut in the middle
            to it; longer questions of a data file are left out.
        chunk_tokens: Chunk size, which decides how prompts are tokenised.
        seed: RULER's.
        sources: RULER's source texts.
        longbench: Folder (or `data.zip`) of LongBench; fetched from the hub if `None`.

    Raises:
        InputError: For an unknown task or a bad file.
    """
    known = task_names()
    for name in tasks:
        if name not in known:
            msg = f"unknown task {name!r}; allowed: {', '.join(known)}"
            raise InputError(msg)
    if not tasks and not data:
        msg = "nothing to measure; give a --task, or questions of your own with --data FILE.jsonl"
        raise InputError(msg)

    names = [*tasks, *(path.name.split(".")[0] for path in data)]
    if len(set(names)) < len(names):
        msg = f"two tasks or files have the same name: {', '.join(names)}; results are kept by name, so rename one"
        raise InputError(msg)

    def count(example: TaskExample) -> int:
        return prompt_length(example, tokenizer, chunk_tokens)

    def of_task(name: str) -> tuple[list[TaskExample], TaskExample | None]:
        if name in RULER_TASKS:
            made = list(
                generate(name, max_seq_length=length, num_samples=rows, count_tokens=count, seed=seed, sources=sources)
            )
            longer = generate(
                name, max_seq_length=2 * length, num_samples=1, count_tokens=count, seed=seed + 1, sources=sources
            )
            return made, next(longer)
        loaded = load_longbench(name.removeprefix(_LONGBENCH), longbench)
        kept = loaded if len(loaded) <= rows else [*loaded[:rows], loaded[-1]]
        cut = [
            truncate_example(example, length, lambda text: tokenizer(text)["input_ids"], tokenizer.decode)
            for example in kept
        ]
        return cut[:rows], cut[rows] if len(cut) > rows else None

    def of_file(path: Path) -> tuple[list[TaskExample], TaskExample | None]:
        name = path.name.split(".")[0]
        questions = [replace(example, task=name) for example in load_questions(path)]
        measured = list(islice((one for one in questions if count(one) <= length), rows))
        spare = next((one for one in reversed(questions) if count(one) <= length), None)
        return measured, None if spare in measured else spare

    groups = [*(of_task(name) for name in tasks), *(of_file(path) for path in data)]
    if not any(group for group, _ in groups):
        msg = f"no example fits {length} tokens; give a longer --length"
        raise InputError(msg)
    surroundings = {
        spare.task: _surroundings(spare, measured[0], tokenizer) for measured, spare in groups if spare and measured
    }
    interleaved = zip_longest(*(group for group, _ in groups))
    return [example for together in interleaved for example in together if example is not None], surroundings


def _surroundings(spare: TaskExample, other: TaskExample, tokenizer: Any) -> Surroundings:
    chunks = join_pieces(spare.context, tokenizer, LEAD_IN_TOKENS)
    heads = [str(task_prompt(example, tokenizer, LEAD_IN_TOKENS).prefix).splitlines(True) for example in (spare, other)]
    shared = takewhile(lambda lines: lines[0] == lines[1], zip(*heads, strict=False))
    opening = "".join(first for first, _ in shared)
    return Surroundings(lead_in=chunks[-2] if len(chunks) > 1 else chunks[0], opening=opening)
