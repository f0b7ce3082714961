"""Questions with passages, read from JSON lines, and passages joined to chunks."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prophetkv_rag.errors import InputError


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its accepted answers and the passages to answer it from."""

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]


def read_questions(path: Path, *, limit: int | None = None) -> list[Question]:
    """Read `{id, question, answers[], passages[{title, text}]}` rows from a `.jsonl` or `.jsonl.gz` file.

    Raises:
        InputError: If the file is missing or cannot be read, or a row lacks a field or has something else in it; the
            message names the line and the field.
    """
    if not path.is_file():
        msg = f"no file {path}; give JSON lines with the fields id, question, answers and passages"
        raise InputError(msg)
    questions: list[Question] = []
    lines = _lines(path)
    while limit is None or len(questions) < limit:
        try:
            number, line = next(lines)
        except StopIteration:
            break
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            msg = f"{path} cannot be read ({error}); give JSON lines in UTF-8, in a name that ends in .gz if compressed"
            raise InputError(msg) from error
        try:
            questions.append(_question(json.loads(line)))
        except ValueError as error:
            msg = f"{path}, line {number}: {error}; needed: id, question, answers[], passages[{{title, text}}]"
            raise InputError(msg) from error
    return questions


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def _question(row: Any) -> Question:
    if not isinstance(row, dict):
        msg = f"a row is {_kind(row)}, not an object"
        raise ValueError(msg)
    for name, kind in (("id", (str, int)), ("question", str), ("answers", list), ("passages", list)):
        if name not in row:
            msg = f"{name} is missing"
            raise ValueError(msg)
        if not isinstance(row[name], kind):
            wanted = "a list" if kind is list else "a text"
            msg = f"{name} is {_kind(row[name])}, not {wanted}"
            raise ValueError(msg)
    if not all(isinstance(answer, str) for answer in row["answers"]):
        msg = "answers holds something else than texts"
        raise ValueError(msg)
    passages = tuple(_passage(number, passage) for number, passage in enumerate(row["passages"]))
    return Question(str(row["id"]), row["question"], tuple(row["answers"]), passages)


def _passage(number: int, passage: Any) -> str:
    is_passage = isinstance(passage, dict) and isinstance(passage.get("text"), str)
    if not is_passage or not isinstance(passage.get("title"), (str, type(None))):
        what = "an object without a text, or with a title that is none" if isinstance(passage, dict) else _kind(passage)
        msg = f"passages[{number}] is {what}, not {{title, text}}"
        raise ValueError(msg)
    return f"{passage.get('title') or ''}\n{passage['text']}".strip()


def _kind(value: Any) -> str:
    names = {str: "a text", list: "a list", dict: "an object", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def join_passages(passages: Sequence[str], tokenizer: Any, chunk_tokens: int) -> list[str]:
    """Join neighbouring passages to chunks of at most `chunk_tokens` tokens; a longer passage is cut at a word."""
    chunks: list[str] = []
    current = ""
    for passage in passages:
        for piece in _cut(passage, tokenizer, chunk_tokens):
            joined = f"{current}\n\n{piece}" if current else piece
            if current and _length(joined, tokenizer) > chunk_tokens:
                chunks.append(current)
                joined = piece
            current = joined
    if current:
        chunks.append(current)
    return chunks


def _length(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _cut(passage: str, tokenizer: Any, chunk_tokens: int) -> Iterator[str]:
    while _length(passage, tokenizer) > chunk_tokens:
        words = passage.split(" ")
        low, high = 1, len(words)
        while low < high:  # longest run of words that fits
            middle = (low + high + 1) // 2
            if _length(" ".join(words[:middle]), tokenizer) <= chunk_tokens:
                low = middle
            else:
                high = middle - 1
        yield " ".join(words[:low])
        passage = " ".join(words[low:])
        if not passage:
            return
    yield passage
