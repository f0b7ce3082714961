"""What a command that measures for hours checks before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prophetkv_rag.errors import InputError


def check_writable(*, files: Sequence[Path | None], folders: Sequence[Path | None] = ()) -> None:
    """Make the folders that results go to, and try every file.

    Raises:
        InputError: If one cannot be made or written.
    """
    try:
        for folder in (*folders, *(file.parent for file in files if file)):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            if file is not None:
                existed = file.exists()
                file.open("ab").close()
                if not existed:
                    file.unlink()
    except OSError as error:
        msg = f"results cannot be written: {error}"
        raise InputError(msg) from error


def check_length(length: int, context_window: int) -> None:
    """Raise `InputError` if prompts of this length, in tokens, are more than the model can read."""
    if length > context_window:
        msg = f"--length is {length}, and the model's context window {context_window} tokens; give at most that"
        raise InputError(msg)
