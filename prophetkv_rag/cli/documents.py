"""Finding and reading the text files of a directory."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from prophetkv_rag.cli.database_settings import SETTINGS_FILE
from prophetkv_rag.errors import InputError
from prophetkv_rag.text import decode_text, shown_name

MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TextFile:
    """One readable file: `name` is its path relative to the directory, with forward slashes, as `shown_name` has it."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Documents:
    """The text files of a directory, sorted by name, and what was left out and why."""

    files: list[TextFile]
    skipped: dict[str, str]


def read_documents(directory: Path, *, exclude: Path) -> Documents:
    """Read every text file below `directory`: anything that `decode_text` can read, whatever its ending.

    Hidden files and directories are passed over silently, and so are `exclude`, the database, and the settings file of
    any other. Binary, empty, unreadable and very large files are skipped and named, and so is what is no file (a named
    pipe would be waited for). Symbolic links to directories are not followed.

    Raises:
        InputError: If the directory is missing or holds no text file.
    """
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        msg = f"{directory} {what}; give a directory with text files"
        raise InputError(msg)
    files, skipped, names = [], {}, set[str]()
    for path in _walk(directory, exclude.resolve()):
        name = shown_name(path.relative_to(directory).as_posix())
        if name in names:  # one is no UTF-8, the other spells its bytes
            skipped[f"{name} (another)"] = "its name is shown like another file's; rename it"
            continue
        names.add(name)
        try:
            text = _read_text(path)
        except (OSError, ValueError) as error:
            skipped[name] = _reason(error)
            continue
        files.append(TextFile(name=name, text=text))
    if not files:
        left_out = f" ({len(skipped)} skipped: {_examples(skipped)})" if skipped else ""
        msg = f"{directory} holds no text files{left_out}"
        raise InputError(msg)
    return Documents(files=sorted(files, key=lambda file: file.name), skipped=skipped)


def _walk(directory: Path, exclude: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(directory):
        base = Path(parent)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (base / f).resolve() != exclude)
        found += [base / name for name in sorted(names) if not name.startswith(".") and name != SETTINGS_FILE]
    return found


def _read_text(path: Path) -> str:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        msg = "not a regular file"
        raise ValueError(msg)
    if found.st_size > MAX_FILE_BYTES:
        msg = f"larger than {MAX_FILE_BYTES >> 20} MiB"
        raise ValueError(msg)
    text = decode_text(path.read_bytes())
    if not text.strip():
        msg = "empty"
        raise ValueError(msg)
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)


def _examples(skipped: dict[str, str]) -> str:
    return ", ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
