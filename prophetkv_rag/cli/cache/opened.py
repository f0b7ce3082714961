"""What the commands of `prophetkv-rag cache` share: their options, and the caches of a database without its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prophetkv_rag.cli.database_settings import BLOB_DIRECTORY, require_settings
from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.store.disk import DiskStore


DatabaseOption = Annotated[Path, typer.Option("--db", help="Database directory, made by `prophetkv-rag index`.")]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def open_caches(db: Path, *, needs_key: bool = True) -> DiskStore:
    """Open the chunk caches of a database with the limits it was made with.

    Args:
        db: The database.
        needs_key: Whether blobs are looked into; otherwise encrypted ones may also be handled without their key.

    Raises:
        InputError: If there is no database, or its key file cannot be read and is needed.
    """
    settings = require_settings(db)
    from prophetkv_rag.store.disk import open_disk_store
    from prophetkv_rag.store.encryption import load_key

    options = settings.store_options()
    try:
        options["encryption_key"] = load_key(options["encryption_key"])
    except InputError:
        if needs_key:
            raise
        options["encryption_key"] = None
    return open_disk_store(db.resolve() / BLOB_DIRECTORY, **options)
