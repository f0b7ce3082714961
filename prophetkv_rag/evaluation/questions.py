"""Questions with passages, read from JSON lines, and passages joined to chunks."""

from __future__ import annotations

import gzip
import json
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
        InputError: If the file is missing or a row lacks a field; the message names the line.
    """
    if not path.is_file():
        msg = f"no file {path}; give JSON lines with the fields id, question, answers and passages"
        raise InputError(msg)
    questions: list[Question] = []
    for number, line in _lines(path):
        if limit is not None and len(questions) >= limit:
            break
        try:
            row = json.loads(line)
            passages = tuple(_passage(passage) for passage in row["passages"])
            questions.append(Question(str(row["id"]), row["question"], tuple(row["answers"]), passages))
        except (KeyError, TypeError, ValueError) as error:
            msg = f"{path}, line {number}: {type(error).__name__} {error}; needed: id, question, answers, passages"
            raise InputError(msg) from error
    return questions


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def _passage(passage: Any) -> str:
    title = passage.get("title") or ""
    return f"{title}\n{passage['text']}".strip()


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
