"""What `serve` serves from: a database's caches, or a store for chunks that clients register; and what room it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prophetkv_rag.cli.cache.options import parse_size
from prophetkv_rag.cli.console import progress_console, quiet_libraries, shown_bytes, status
from prophetkv_rag.cli.database import check_packages, open_database
from prophetkv_rag.cli.database_settings import DEFAULT_DATABASE, DatabaseSettings, find_settings, require_settings
from prophetkv_rag.cli.model_choice import chosen_model, load_options
from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.store import ChunkStore


@dataclass(frozen=True, slots=True)
class ServedCaches:
    """Where caches are, and how much room they have.

    Attributes:
        database: Directory made by `index`.
        cache_dir: Directory of a store without a database; without either the store is in memory.
        remote: URL of the tier behind `cache_dir`.
        disk_bytes: Most bytes in `cache_dir`, or in memory; `None` for no limit, if
        is_limited: somebody said so: else it is chosen from what is free.
        ram_bytes: Most bytes in memory in front of the disk; `None` to choose.
    """

    database: Path | None
    cache_dir: Path | None
    remote: str | None
    disk_bytes: int | None
    is_limited: bool
    ram_bytes: int | None

    @classmethod
    def asked(
        cls, database: Path | None, cache_dir: Path | None, remote: str | None, limit: str | None, ram: str | None
    ) -> ServedCaches:
        """Return what the options say; `InputError` if they do not fit each other."""
        if database is None and cache_dir is None and find_settings(DEFAULT_DATABASE) is not None:
            database = DEFAULT_DATABASE
        disk_bytes = None if limit is None else parse_size(limit)
        ram_bytes = None if ram is None else parse_size(ram)
        if ram is not None and ram_bytes is None:
            msg = "--ram-limit is 'none'; give the most bytes, such as 4GB, or 0 to hold none"
            raise InputError(msg)
        if ram is not None and database is None and cache_dir is None:
            msg = "--ram-limit goes with --database or --cache-dir; in memory alone the limit is --cache-limit"
            raise InputError(msg)
        if database is not None and limit is not None:
            msg = f"--cache-limit goes without a database; the one at {database} has the limit that `index` gave it"
            raise InputError(msg)
        return cls(database, cache_dir, remote, disk_bytes, limit is not None, ram_bytes)


@contextmanager
def open_served(
    caches: ServedCaches, model: str | None, config: Any, *, dtype: str | None = None, device: str = "auto"
) -> Iterator[tuple[ProphetKVEngine, str]]:
    """Open the engine: a database's, or one on a plain store; yields it with the model's name."""
    remembered = require_settings(caches.database) if caches.database is not None else None
    quiet_libraries()
    if remembered is not None:
        check_packages(remembered)
    elif caches.remote is not None:
        from prophetkv_rag.store.remote import RemoteFiles

        RemoteFiles(caches.remote)  # before a model is fetched
    chosen = chosen_model(model, remembered.model if remembered else None)
    if caches.database is not None and remembered is not None:
        settings = replace(remembered, model=chosen, dtype=dtype or remembered.dtype)
        yield from _database(caches.database, settings, caches.ram_bytes, config, device)
        return
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.model import load_model

    load = load_options(dtype, device)
    with status(f"loading {Path(chosen).name}"):
        loaded, tokenizer = load_model(chosen, **load)  # first: what it takes is not free for caches
        store = _open_store(caches)
        engine = ProphetKVEngine(loaded, tokenizer, config=config, store=store)
    say_what_caches_take(store)
    try:
        yield engine, Path(chosen).name
    finally:
        engine.store.close()


def _database(
    path: Path, settings: DatabaseSettings, ram_bytes: int | None, config: Any, device: str
) -> Iterator[tuple[ProphetKVEngine, str]]:
    opened = open_database(path, settings, config=config, ram_bytes=ram_bytes, device=device)
    try:
        opened.bring_caches_up_to_date()
        say_what_caches_take(opened.store)
        yield opened.engine, Path(settings.model).name
    finally:
        opened.close()


def _open_store(caches: ServedCaches) -> ChunkStore:
    from prophetkv_rag.store import MemoryStore
    from prophetkv_rag.store.disk import free_memory, open_disk_store

    limit = caches.disk_bytes
    if caches.cache_dir is None:
        free = free_memory()
        return MemoryStore(limit if caches.is_limited or free is None else free // 2)
    options: Any = {"remote": caches.remote, "ram_bytes": caches.ram_bytes}
    if not caches.is_limited:
        limit = chosen_limit(caches.cache_dir)
    return open_disk_store(caches.cache_dir, max_bytes=limit, **options)


def chosen_limit(directory: Path) -> int | None:
    """Return the most bytes of caches in a directory where nobody says: what is there, and half of what is free."""
    from prophetkv_rag.store.disk import default_disk_bytes, open_disk_store

    with closing(open_disk_store(directory, ram_bytes=0)) as store:
        held = store.stats().nbytes  # opened with less than it holds, a store evicts
    try:
        return default_disk_bytes(directory, held)
    except OSError:  # a file system that does not tell what is free
        return None


def say_what_caches_take(store: ChunkStore) -> None:
    """Say what a store holds, and may hold."""
    stats = store.stats()
    text = f"KV caches: {stats.chunks:,} chunks, {stats.tokens:,} tokens, {shown_bytes(stats.nbytes)}"
    most = "without a limit" if stats.max_nbytes is None else f"{shown_bytes(stats.max_nbytes)} at most"
    text += f" in {stats.location}, {most}"
    if stats.ram_max_nbytes is not None:
        text += f"; up to {shown_bytes(stats.ram_max_nbytes)} of them in memory"
    progress_console().print(text, markup=False, soft_wrap=True)
