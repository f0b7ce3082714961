"""The user's home directory, which a container that runs under an arbitrary user id does not have."""

from __future__ import annotations

import os
from pathlib import Path

from prophetkv_rag.errors import InputError


def require_home(what: str) -> None:
    """Raise `InputError` if there is no home directory, which `what` cannot do without.

    Libraries then fail with errors of their own, or make a directory that is called `~`.
    """
    if os.path.expanduser("~").startswith("~"):
        user = f"the user id {os.getuid()} is not in the system's list" if hasattr(os, "getuid") else "nothing says it"
        msg = (
            f"{what} needs a home directory and there is none (HOME is not set, and {user}): set HOME to a directory "
            "that can be written to"
        )
        raise InputError(msg)


def expand_user(path: str | Path, *, what: str) -> Path:
    """Return a path with a leading `~` or `~user` replaced; `InputError` if nobody knows whose home that is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        msg = f"{what} is {str(path)!r}, and there is no such home directory (is HOME set?); write the whole path"
        raise InputError(msg) from None
