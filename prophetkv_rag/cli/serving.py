"""What `serve` serves from: a database's caches, or a store for chunks that clients register; and what room it has."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prophetkv_rag.cli.cache.options import parse_size
from prophetkv_rag.cli.console import progress_console, quiet_libraries, shown_bytes, status
from prophetkv_rag.cli.database import Database, check_packages, open_database
from prophetkv_rag.cli.database_settings import (
    DEFAULT_DATABASE,
    DatabaseSettings,
    find_settings,
    require_settings,
    require_transformers,
)
from prophetkv_rag.cli.model_choice import chosen_model, load_options
from prophetkv_rag.cli.vllm_engine import check_vllm, start_vllm
from prophetkv_rag.errors import InputError, ProphetKVError

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.integrations.vllm import VLLMEngine
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

    @property
    def settings(self) -> DatabaseSettings | None:
        """Of the database, if there is one; `InputError` if it is none."""
        return None if self.database is None else require_settings(self.database)

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


def check_served_by_vllm(caches: ServedCaches) -> None:
    """Raise `InputError` where vLLM has no caches to serve from."""
    remembered = caches.settings
    if remembered is None and caches.cache_dir is None:
        msg = "--engine vllm takes --cache-dir, or --database with one that `index --engine vllm` made"
        raise InputError(msg)
    if remembered is not None and remembered.engine != "vllm":
        msg = (
            f"the KV caches of the database at {caches.database} are transformers': serve it without --engine vllm, or "
            f"have all of them computed again by vLLM (prophetkv-rag index DIR --engine vllm --db {caches.database}); "
            "--cache-dir serves without a database"
        )
        raise InputError(msg)


@contextmanager
def open_served(
    caches: ServedCaches, model: str | None, config: Any, *, dtype: str | None = None, device: str = "auto"
) -> Iterator[tuple[ProphetKVEngine, str]]:
    """Open the engine: a database's, or one on a plain store; yields it with the model's name."""
    remembered = caches.settings
    quiet_libraries()
    if caches.database is not None and remembered is not None:
        require_transformers(remembered, caches.database)
        check_packages(remembered)
    elif caches.remote is not None:
        from prophetkv_rag.store.remote import RemoteFiles

        RemoteFiles(caches.remote)  # before a model is fetched
    chosen = chosen_model(model, remembered.model if remembered else None)
    if caches.database is not None and remembered is not None:
        settings = replace(remembered, model=chosen, dtype=dtype or remembered.dtype)
        opened = open_database(caches.database, settings, config=config, ram_bytes=caches.ram_bytes, device=device)
        yield from _database(opened)
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


def _database(opened: Database) -> Iterator[tuple[Any, str]]:
    try:
        opened.bring_caches_up_to_date()
        say_what_caches_take(opened.store)
        yield opened.engine, Path(opened.settings.model).name
    finally:
        opened.close()


@contextmanager
def open_served_in_vllm(
    caches: ServedCaches, model: str | None, arguments: dict[str, Any], **connector: Any
) -> Iterator[tuple[VLLMEngine, str]]:
    """Start vLLM on a database's caches, or on those of chunks that clients register; see `open_served`.

    Should vLLM die, this process gets SIGTERM, as whoever started it would send it.

    Args:
        caches: Where they are.
        model: Path or hub name; `None` for the database's, or the default one.
        arguments: Keywords of vLLM's `AsyncEngineArgs`.
        **connector: Fields of `ConnectorSettings`.

    Raises:
        ProphetKVError: At the end, if vLLM has died.
    """
    with _served_in_vllm(caches, model, arguments, connector) as (engine, name):
        engine.watch(lambda: os.kill(os.getpid(), signal.SIGTERM))
        yield engine, name
    if engine.has_died:
        msg = "vLLM has died: one of its processes ended, see above; start the server again"
        raise ProphetKVError(msg)


@contextmanager
def _served_in_vllm(
    caches: ServedCaches, model: str | None, arguments: dict[str, Any], connector: dict[str, Any]
) -> Iterator[tuple[VLLMEngine, str]]:
    remembered = caches.settings
    if caches.database is not None and remembered is not None:
        check_packages(remembered)
        chosen, given = chosen_model(model, remembered.model), remembered.vllm_args | arguments
        settings = replace(remembered, model=chosen, vllm_args=given)
        yield from _database(open_database(caches.database, settings, connector=connector))
        return
    assert caches.cache_dir is not None, "checked by serve"
    check_vllm()
    chosen = chosen_model(model)
    limit = caches.disk_bytes if caches.is_limited else chosen_limit(caches.cache_dir)
    engine = start_vllm(chosen, caches.cache_dir, arguments, max_bytes=limit, **connector)
    say_what_caches_take(engine.store)
    try:
        yield engine, Path(chosen).name
    finally:
        engine.close()


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
    if stats.ram_max_nbytes:
        text += f"; up to {shown_bytes(stats.ram_max_nbytes)} of them in memory"
    progress_console().print(text, markup=False, soft_wrap=True)
