"""Which model a command uses: the one named, the one the database was made with, or the default."""

from __future__ import annotations

from pathlib import Path

from prophetkv_rag.cli.console import status


def chosen_model(named: str | None, remembered: str | None = None) -> str:
    """Return a local directory (absolute) or a hub name; fetches the default model if nothing else is chosen."""
    if named is not None:
        path = Path(named).expanduser()
        return str(path.resolve()) if path.exists() else named
    if remembered is not None:
        return remembered
    from prophetkv_rag.default_model import fetch_default_model

    with status("looking for the default model") as tell:
        return str(fetch_default_model(tell))


def fetch_embedding() -> None:
    """Make sure the embedding model is there, telling what is done."""
    from prophetkv_rag.embedding import fetch_embedding_model

    with status("looking for the embedding model") as tell:
        fetch_embedding_model(tell)
