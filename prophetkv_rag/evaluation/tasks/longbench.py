"""LongBench v1 and LongBench-E: rows read from the official files, put into the official prompts.

The prompts and output lengths are those of THUDM/LongBench (github.com/THUDM/LongBench, commit 2e00731), word for word,
in `longbench_prompts.json`. They are MIT-licensed, Copyright (c) 2023 THU-KEG & Zhipu AI; the licence stands in that
file. The rows themselves are not part of this package: they are downloaded, or read from a folder.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.longbench_units import split_context

REPOSITORY = "THUDM/LongBench"
ARCHIVE = "data.zip"

_METRICS = {
    "narrativeqa": "qa_f1",
    "qasper": "qa_f1",
    "multifieldqa_en": "qa_f1",
    "multifieldqa_zh": "qa_f1_zh",
    "hotpotqa": "qa_f1",
    "2wikimqa": "qa_f1",
    "musique": "qa_f1",
    "dureader": "rouge_l_zh",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "vcsum": "rouge_l_zh",
    "trec": "classification",
    "triviaqa": "qa_f1",
    "samsum": "rouge_l",
    "lsht": "classification",
    "passage_count": "count",
    "passage_retrieval_en": "retrieval",
    "passage_retrieval_zh": "retrieval_zh",
    "lcc": "code_similarity",
    "repobench-p": "code_similarity",
}
LONGBENCH_TASKS = tuple(_METRICS)
"""The 21 tasks of LongBench v1, by their official names."""

_EVEN = (
    "qasper multifieldqa_en hotpotqa 2wikimqa gov_report multi_news trec triviaqa samsum passage_count "
    "passage_retrieval_en lcc repobench-p"
)
LONGBENCH_E_TASKS = tuple(f"{task}_e" for task in _EVEN.split())
"""The 13 tasks of LongBench-E, whose rows spread evenly over lengths."""

_PLAIN_TASKS = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # no chat template
_CODE_TASKS = ("lcc", "repobench-p")


Encode = Callable[[str], Sequence[int]]
Decode = Callable[[Sequence[int]], str]


def load_longbench(task: str, folder: Path | None = None, limit: int | None = None) -> list[TaskExample]:
    """Read a task's rows.

    Args:
        task: One of `LONGBENCH_TASKS` or `LONGBENCH_E_TASKS`; the examples' task is `longbench_` and this name.
        folder: Folder with `<task>.jsonl` or `.jsonl.gz`, itself or in `data/`; or the downloaded `data.zip`. `None`
            downloads `data.zip` from the Hugging Face hub, or takes it from the hub's cache.
        limit: Stop after this many rows.

    Raises:
        InputError: If the task is unknown, the data cannot be found, fetched or read (the message says what to
            download), or a row lacks a field (the message names file, line and field).
    """
    if task not in LONGBENCH_TASKS + LONGBENCH_E_TASKS:
        msg = f"unknown LongBench task {task!r}; allowed: {', '.join(LONGBENCH_TASKS + LONGBENCH_E_TASKS)}"
        raise InputError(msg)
    source = _downloaded() if folder is None else folder
    examples: list[TaskExample] = []
    with _open(task, source) as (name, lines):
        for number, line in _numbered(name, lines):
            if limit is not None and len(examples) >= limit:
                break
            if line.strip():
                examples.append(_example(task, line, f"{name}, line {number}"))
    return examples


def truncate_middle(text: str, max_tokens: int, encode: Encode, decode: Decode) -> str:
    """Keep the first and the last `max_tokens // 2` tokens of a text that has more than `max_tokens`.

    Args:
        text: Officially the whole prompt, before the chat template is put around it.
        max_tokens: The model's maximum, less what is to be generated if the caller wants room for it.
        encode: Text to token ids; officially with the special tokens, which then count.
        decode: Token ids to text; officially without special tokens.
    """
    halves = _halves(text, max_tokens, encode, decode)
    return text if halves is None else "".join(halves)


def truncate_example(example: TaskExample, max_tokens: int, encode: Encode, decode: Decode) -> TaskExample:
    """Apply `truncate_middle` to an example's prompt, its parts kept apart; a piece left empty is dropped."""
    parts = (example.before, *example.context, example.after)
    text = "".join(parts)
    halves = _halves(text, max_tokens, encode, decode)
    if halves is None:
        return example
    head, tail = halves
    tail_start = len(text) - len(tail)  # `head` and `tail` lie at the two ends of the text; the middle is gone
    kept: list[str] = []
    start = 0
    for part in parts:
        end = start + len(part)
        kept.append(head[start:end] + tail[max(start - tail_start, 0) : max(end - tail_start, 0)])
        start = end
    query = example.query if example.query is not None and example.query in kept[-1] else None
    context = tuple(piece for piece in kept[1:-1] if piece)
    return replace(example, before=kept[0], context=context, after=kept[-1], query=query)


def metric_of(task: str) -> str:
    """Return the name of a task's official metric."""
    return _METRICS[task.removesuffix("_e")]


def _halves(text: str, max_tokens: int, encode: Encode, decode: Decode) -> tuple[str, str] | None:
    half = max_tokens // 2
    if half < 1:
        msg = f"cannot cut a prompt to {max_tokens} tokens: at least 2 are needed, one from each end"
        raise InputError(msg)
    tokens = encode(text)
    return None if len(tokens) <= max_tokens else (decode(tokens[:half]), decode(tokens[-half:]))


def _example(task: str, line: str, where: str) -> TaskExample:
    row = _row(line, where)
    base, metric = task.removesuffix("_e"), metric_of(task)
    prompts, max_new_tokens = _official()
    before, _, rest = prompts[base].partition("{context}")
    question = _text(row, "input", where)
    is_question = "{input}" in rest and base not in _CODE_TASKS  # before code stands code, not a question
    return TaskExample(
        task=f"longbench_{task}",
        example_id=_text(row, "_id", where),
        before=before,
        context=split_context(task, _text(row, "context", where)),
        after=rest.format(input=question),
        query=question if is_question and question else None,
        answer_prefix="",
        references=_texts(row, "answers", where),
        metric=metric,
        max_new_tokens=max_new_tokens[base],
        chat=base not in _PLAIN_TASKS,
        all_classes=_texts(row, "all_classes", where) if metric == "classification" else (),
        stop_at_newline=base == "samsum",
    )


def _row(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except ValueError as error:
        msg = f"{where}: not JSON ({error})"
        raise InputError(msg) from error
    if not isinstance(row, dict):
        msg = f"{where}: a JSON object with input, context, answers, all_classes and _id is needed, not {line[:60]!r}"
        raise InputError(msg)
    return row


def _text(row: dict[str, object], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        msg = f"{where}: field {field!r} must be a text, {_given(row, field)}"
        raise InputError(msg)
    return value


def _texts(row: dict[str, object], field: str, where: str) -> tuple[str, ...]:
    value = row.get(field)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        msg = f"{where}: field {field!r} must be a list of texts, {_given(row, field)}"
        raise InputError(msg)
    return tuple(value)


def _given(row: dict[str, object], field: str) -> str:
    return f"not {row[field]!r:.60}" if field in row else f"but is missing; there are: {', '.join(row)}"


@cache
def _official() -> tuple[dict[str, str], dict[str, int]]:
    text = files("prophetkv_rag.evaluation.tasks").joinpath("longbench_prompts.json").read_text("utf-8")
    data: dict[str, Any] = json.loads(text)
    return data["prompts"], data["max_new_tokens"]


def _downloaded() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, ARCHIVE, repo_type="dataset"))
    except Exception as error:  # offline, refused, no room: the hub's client raises many kinds
        msg = (
            f"cannot fetch {ARCHIVE} of the dataset {REPOSITORY} from the Hugging Face hub ({type(error).__name__}: "
            f"{error}). {_advice()}"
        )
        raise InputError(msg) from error


def _advice() -> str:
    url = f"https://huggingface.co/datasets/{REPOSITORY}/resolve/main/{ARCHIVE}"
    return f"Download {url} on a machine that can, and give its path, or the folder it was unpacked into"


@contextmanager
def _open(task: str, source: Path) -> Iterator[tuple[str, IO[str]]]:
    """The task's file, in a folder or in the archive, as its name and its lines."""
    if source.suffix == ".zip" and source.is_file():
        member = f"data/{task}.jsonl"
        try:
            with zipfile.ZipFile(source) as archive, archive.open(member) as raw:
                yield f"{source}:{member}", io.TextIOWrapper(raw, encoding="utf-8")
        except (KeyError, zipfile.BadZipFile) as error:
            msg = f"no {member} in {source}, or not a whole archive ({error}). {_advice()}"
            raise InputError(msg) from error
        return
    names = [f"{place}{task}{ending}" for place in ("", "data/") for ending in (".jsonl", ".jsonl.gz")]
    path = next((source / name for name in names if (source / name).is_file()), None)
    if path is None:
        msg = f"no LongBench data for {task!r}: none of {', '.join(names)} in {source}. {_advice()}"
        raise InputError(msg)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        yield str(path), lines


def _numbered(name: str, lines: IO[str]) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            yield number, line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        msg = f"{name}, behind line {number}: cannot be read ({type(error).__name__}: {error}); download it again"
        raise InputError(msg) from error
