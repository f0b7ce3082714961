"""`prophetkv-rag cache new-key|rekey`: the key that caches are encrypted with."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from prophetkv_rag.cli.cache.opened import DatabaseOption, JsonOption, open_caches
from prophetkv_rag.cli.console import print_json, progress_bar, results
from prophetkv_rag.cli.database_settings import DEFAULT_DATABASE, require_settings, save_settings


def new_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to make; one that is there is left alone.")],
    as_json: JsonOption = False,
) -> None:
    """Make a random key for encrypting caches (`index --key-file FILE`). Without it the caches cannot be read again."""
    from prophetkv_rag.store.encryption import write_new_key

    key = write_new_key(file)
    if as_json:
        print_json({"file": str(file), "key_id": key.id})
        return
    results().print(f"a new key is in {file}; its id is {key.id}", markup=False)


def rekey(
    key_file: Annotated[str, typer.Option(metavar="FILE", help="The new key, or 'none' for no encryption any more.")],
    db: DatabaseOption = DEFAULT_DATABASE,
    as_json: JsonOption = False,
) -> None:
    """Encrypt all caches with another key, or for the first time. Nobody else may use the database meanwhile."""
    from prophetkv_rag.store.disk import must_be_unlocked
    from prophetkv_rag.store.disk import rekey as encrypt_anew
    from prophetkv_rag.store.encryption import load_key

    settings = require_settings(db)
    new_file = "" if key_file == "none" else str(Path(key_file).absolute())
    new_key = load_key(new_file) if new_file else None
    store = open_caches(db)
    must_be_unlocked(store.files)
    save_settings(db, replace(settings, key_file=new_file))
    with progress_bar("writing caches anew", len(store.catalog.rows())) as advance:
        report = encrypt_anew(store, new_key, advance)
    store.close()
    if as_json:
        print_json({**asdict(report), "key_id": None if new_key is None else new_key.id})
        return
    how = "not encrypted any more" if new_key is None else f"encrypted with the key {new_key.id}"
    results().print(f"{report.changed} caches are {how}; {report.dropped} were dropped", markup=False)
