"""Questions with documents from SQuAD and HotpotQA files; every defect is named with its file and row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prophetkv_rag.errors import InputError


@dataclass(frozen=True, slots=True)
class DocumentQuestion:
    """A question and its documents.

    Attributes:
        question: As in the file.
        answers: All accepted answers.
        own: Documents that are always in the prompt: SQuAD's paragraph, HotpotQA's ten.
        related: Documents that come before random ones: the other paragraphs of the SQuAD article.
    """

    question: str
    answers: tuple[str, ...]
    own: tuple[str, ...]
    related: tuple[str, ...] = ()


def read_squad(path: Path) -> list[DocumentQuestion]:
    """Return the answerable questions of a SQuAD file, in file order."""
    questions: list[DocumentQuestion] = []
    data = _parse(_read(path), str(path))
    for number, article in enumerate(_field(data, "data", list, str(path))):
        where = f"{path}, article {number}"
        paragraphs = _field(article, "paragraphs", list, where)
        texts = [_field(p, "context", str, f"{where}, paragraph {n}") for n, p in enumerate(paragraphs)]
        for position, paragraph in enumerate(paragraphs):
            inside = f"{where}, paragraph {position}"
            related = _distinct(text for text in texts if text != texts[position])
            for count, row in enumerate(_field(paragraph, "qas", list, inside)):
                at = f"{inside}, question {count}"
                question = _field(row, "question", str, at)
                if row.get("is_impossible", False):
                    continue
                answers = [_field(answer, "text", str, f"{at}, answers") for answer in _field(row, "answers", list, at)]
                questions.append(DocumentQuestion(question, _some(answers, at), (texts[position],), related))
    return questions


def read_hotpot(path: Path) -> list[DocumentQuestion]:
    """Return the questions of a HotpotQA file, in file order; a document is its title, a newline and its text."""
    text = _read(path)
    if not text.lstrip().startswith("["):
        lines = enumerate(text.split("\n"), start=1)
        return [_hotpot_line(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    return [_hotpot_row(row, f"{path}, row {number}") for number, row in enumerate(_parse(text, str(path)))]


def _hotpot_row(row: Any, where: str) -> DocumentQuestion:
    documents = []
    for number, entry in enumerate(_field(row, "context", list, where)):
        match entry:
            case [str(title), [*sentences]] if all(isinstance(sentence, str) for sentence in sentences):
                documents.append(f"{title}\n{''.join(sentences)}")
            case _:
                msg = f"{where}: context {number} must be [title, [sentence, ...]]"
                raise InputError(msg)
    answers = (_field(row, "answer", str, where),)
    return DocumentQuestion(_field(row, "question", str, where), answers, _distinct(documents))


def _hotpot_line(line: str, where: str) -> DocumentQuestion:
    row = _parse(line, where)
    documents = []
    for number, passage in enumerate(_field(row, "passages", list, where)):
        at = f"{where}, passage {number}"
        documents.append(f"{_field(passage, 'title', str, at)}\n{_field(passage, 'text', str, at)}")
    answers = _some(_field(row, "answers", list, where), where)
    return DocumentQuestion(_field(row, "question", str, where), answers, _distinct(documents))


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        msg = f"cannot read {path}: {error}"
        raise InputError(msg) from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        msg = f"{where}: not JSON: {error}"
        raise InputError(msg) from error


def _field(row: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(row, dict) or name not in row:
        msg = f"{where}: the field {name!r} is missing"
        raise InputError(msg)
    if not isinstance(row[name], kind):
        msg = f"{where}: the field {name!r} must be a {kind.__name__}, not {type(row[name]).__name__}"
        raise InputError(msg)
    return row[name]


def _some(answers: list[Any], where: str) -> tuple[str, ...]:
    """Return the distinct answers; refuse a question without any."""
    if not answers or not all(isinstance(answer, str) for answer in answers):
        msg = f"{where}: the field 'answers' must hold at least one text"
        raise InputError(msg)
    return _distinct(answers)


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def all_documents(questions: Iterable[DocumentQuestion]) -> list[str]:
    """Return every document of the file once, sorted."""
    return sorted(set(_documents(questions)))


def _documents(questions: Iterable[DocumentQuestion]) -> Iterator[str]:
    for question in questions:
        yield from question.own
        yield from question.related
