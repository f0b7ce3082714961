"""The shipped corpus: public-domain speeches, and questions about them; their origin stands beside them."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

_FOLDER = resources.files("prophetkv_rag") / "defaults" / "demo_corpus"
_SPEECHES = _FOLDER / "state-of-the-union"


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """A question about the speeches.

    Attributes:
        question: Its text.
        expected: An answer is right if it holds one of these.
        file: Name of the speech that says so.
    """

    question: str
    expected: tuple[str, ...]
    file: str


def speeches_directory() -> AbstractContextManager[Path]:
    """The shipped speeches as a directory, also from a zipped installation."""
    return resources.as_file(_SPEECHES)


def read_speeches() -> dict[str, str]:
    """The shipped speeches by the names of their files, in the order of those."""
    files = sorted(
        (entry for entry in _SPEECHES.iterdir() if entry.name.endswith(".txt")), key=lambda entry: entry.name
    )
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def read_questions() -> list[DemoQuestion]:
    """The shipped questions."""
    entries = json.loads((_FOLDER / "questions.json").read_text(encoding="utf-8"))
    return [DemoQuestion(entry["question"], tuple(entry["expected"]), entry["file"]) for entry in entries]
