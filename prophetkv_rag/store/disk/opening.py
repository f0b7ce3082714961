"""Opening a store on disk, with what is to stand behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.tiered import TieredStore


def open_disk_store(directory: str | Path, *, remote: str | None = None, **settings: Any) -> DiskStore:
    """Open a store on disk, with a remote tier behind it where one is named.

    Args:
        directory: Where the disk tier is.
        remote: URL that fsspec knows, such as `s3://bucket/prefix`; `None` for none.
        **settings: See `DiskStore`, and with a remote `TieredStore`.

    Raises:
        InputError: If a setting is not allowed.
        StoreError: If the directory cannot be used.
    """
    if remote is not None:
        return TieredStore(directory, remote=remote, **settings)
    given = [name for name, value in settings.items() if name.startswith("remote_") and value is not None]
    if given:
        msg = f"{', '.join(given)}: there is no remote tier; name one with remote=..."
        raise InputError(msg)
    return DiskStore(directory, **{name: value for name, value in settings.items() if not name.startswith("remote_")})
