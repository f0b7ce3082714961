"""Task names and files to examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.longbench import (
    LONGBENCH_E_TASKS,
    LONGBENCH_TASKS,
    load_longbench,
    metric_of,
    truncate_example,
)
from prophetkv_rag.evaluation.tasks.own_data import load_questions
from prophetkv_rag.evaluation.tasks.prompting import prompt_length, user_turn
from prophetkv_rag.evaluation.tasks.ruler import RULER_TASKS, Sources, TaskSettings, generate
from prophetkv_rag.evaluation.tasks.surroundings import Surroundings, surroundings_of

_LONGBENCH = "longbench_"
_SPARES = 20
"""How many questions of a file are looked through for a lead-in, from its end on."""


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
    whatever the number of rows: of LongBench the last one, of a data file the last one with text that no other question
    holds, measured or not; if it is measured the task has no surroundings. Of RULER it is one of twice the length and
    another seed.

    Args:
        tasks: Names of tasks (`task_names`).
        data: Question files of the user's own; each becomes a task of the file's name.
        tokenizer: Measures prompts.
        rows: Examples per task.
        length: RULER prompts are made to fit this many tokens, the answer included; LongBench's are cut in the middle
            to it, chat template included; longer questions of a data file are left out.
        chunk_tokens: Chunk size, which decides how prompts are tokenised.
        seed: RULER's.
        sources: RULER's source texts.
        longbench: Folder (or `data.zip`) of LongBench; fetched from the hub if `None`.

    Raises:
        InputError: For an unknown task or a bad file.
    """
    check_names(tasks, data)

    def count(example: TaskExample) -> int:
        return prompt_length(example, tokenizer, chunk_tokens)

    def around(spare: TaskExample, measured: list[TaskExample], others: list[TaskExample]) -> Surroundings:
        return surroundings_of(spare, measured[0], others, tokenizer)

    def of_task(name: str) -> tuple[list[TaskExample], Surroundings | None]:
        if name in RULER_TASKS:
            made = list(
                generate(name, max_seq_length=length, num_samples=rows, count_tokens=count, seed=seed, sources=sources)
            )
            longer = generate(
                name, max_seq_length=2 * length, num_samples=1, count_tokens=count, seed=seed + 1, sources=sources
            )
            return made, around(next(longer), made, made)
        loaded = load_longbench(name.removeprefix(_LONGBENCH), longbench)
        kept = loaded if len(loaded) <= rows else [*loaded[:rows], loaded[-1]]
        cut = [
            truncate_example(
                example,
                length - _around(example, tokenizer),
                lambda text: tokenizer(text)["input_ids"],
                tokenizer.decode,
            )
            for example in kept
        ]
        return cut[:rows], around(cut[rows], cut[:rows], cut[:rows]) if len(cut) > rows else None

    def of_file(path: Path) -> tuple[list[TaskExample], Surroundings | None]:
        name = path.name.split(".")[0]
        questions = [replace(example, task=name) for example in load_questions(path)]
        if not questions:
            msg = f"{path} holds no questions; give JSON lines with the fields id, question, answers and passages"
            raise InputError(msg)
        measured = list(islice((one for one in questions if count(one) <= length), rows))
        found = None
        for spare in islice((one for one in reversed(questions) if count(one) <= length), _SPARES):
            if spare in measured:
                break
            found = around(spare, measured, [one for one in questions if one is not spare])
            if found.lead_in is not None:
                break
        return measured, found

    groups = [*(of_task(name) for name in tasks), *(of_file(path) for path in data)]
    if not any(measured for measured, _ in groups):
        msg = f"no example fits {length} tokens; give a longer --length"
        raise InputError(msg)
    surroundings = {measured[0].task: found for measured, found in groups if found}
    interleaved = zip_longest(*(measured for measured, _ in groups))
    return [example for together in interleaved for example in together if example is not None], surroundings


def check_sources(tasks: Sequence[str], *, length: int, seed: int, sources: Sources | None) -> None:
    """Open what RULER's tasks are made of (word lists, source texts), as `load_examples` does with a tokenizer.

    Raises:
        InputError: For a file that is missing or malformed.
        MissingExtraError: If a package that a task needs is not installed.
    """

    def no_tokenizer(example: TaskExample) -> int:
        raise AssertionError(example.task)  # a task that counts before it builds would never end with a guess

    for name in tasks:
        if name in RULER_TASKS:
            RULER_TASKS[name](TaskSettings(name, length, seed, no_tokenizer, sources or Sources()))


def metric_names(tasks: Sequence[str]) -> set[str]:
    """Return the official metrics of LongBench's tasks among these; RULER's need no package."""
    return {metric_of(name.removeprefix(_LONGBENCH)) for name in tasks if name.startswith(_LONGBENCH)}


def check_names(tasks: Sequence[str], data: Sequence[Path]) -> None:
    """Raise `InputError` for what can be told before a model is loaded: unknown tasks, missing files, equal names."""
    known = task_names()
    for name in tasks:
        if name not in known:
            msg = f"unknown task {name!r}; allowed: {', '.join(known)}"
            raise InputError(msg)
    if not tasks and not data:
        msg = "nothing to measure; give a --task, or questions of your own with --data FILE.jsonl"
        raise InputError(msg)
    for path in data:
        if not path.is_file():
            msg = f"no file {path}; give JSON lines with the fields id, question, answers and passages"
            raise InputError(msg)
    names = [*tasks, *(path.name.split(".")[0] for path in data)]
    if len(set(names)) < len(names):
        msg = f"two tasks or files have the same name: {', '.join(names)}; results are kept by name, so rename one"
        raise InputError(msg)


def _around(example: TaskExample, tokenizer: Any) -> int:
    """Return the tokens that the chat template and the answer prefix put around an example's text."""
    texts = user_turn(tokenizer, "", "") if example.chat else ("", "")
    return sum(
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (*texts, example.answer_prefix) if text
    )
