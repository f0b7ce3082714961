"""A user's own questions: every mistake in the file is one line that names the place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag import InputError
from prophetkv_rag.evaluation.tasks.questions import Question, read_questions

ROW: dict[str, Any] = {
    "id": 7,
    "question": "Who?",
    "answers": ["Ada"],
    "passages": [{"title": "T", "text": "one"}, {"text": "two"}, {"title": None, "text": "three"}],
}


def write(path: Path, *rows: Any) -> Path:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_are_read(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, ROW, "", ROW | {"answers": []}, "{")
    first, second = read_questions(file, limit=2)
    assert first == Question("7", "Who?", ("Ada",), ("T\none", "two", "three"))
    assert second.answers == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"passages": ["just a text"]}, r"line 2: passages\[0\] is a text, not \{title, text\}"),
        (ROW | {"passages": [{"text": "a"}, {"title": "b"}]}, r"line 2: passages\[1\] is an object without a text"),
        (ROW | {"passages": [{"text": "a", "title": 5}]}, r"line 2: passages\[0\] is an object"),
        (ROW | {"passages": {"text": "a"}}, "line 2: passages is an object, not a list"),
        (ROW | {"answers": "Ada"}, "line 2: answers is a text, not a list"),
        (ROW | {"answers": [5]}, "line 2: answers holds something else than texts"),
        (ROW | {"question": 5}, "line 2: question is a number, not a text"),
        (ROW | {"question": None}, "line 2: question is null, not a text"),
        ({"id": 1}, "line 2: question is missing"),
        ([], "line 2: a row is a list, not an object"),
        ("{", "line 2: Expecting"),
    ],
)
def test_a_row_that_is_wrong_names_the_line_and_the_field(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_questions(write(tmp_path / "rows.jsonl", ROW, row))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", "{}\n".encode("utf-16")),
        ("rows.jsonl", gzip.compress(b"{}", mtime=0)),
        ("rows.jsonl.gz", b"{}"),
        ("rows.jsonl.gz", gzip.compress(json.dumps(ROW).encode() * 100, mtime=0)[:-20]),
        ("rows.jsonl.gz", gzip.compress(b"x" * 500, mtime=0)[:12] + b"\xff" * 40),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=r"rows\.jsonl(\.gz)? cannot be read \(.*UTF-8"):
        read_questions(tmp_path / name)
