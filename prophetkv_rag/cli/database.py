"""A database directory: Chroma's files, the chunk caches beside them, and the settings that both were made with.

<database>/prophetkv-rag.json      model and chunk size, so that `ask` uses what `index` used
<database>/chroma.sqlite3, ...     Chroma's own
<database>/prophetkv/              chunk caches
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prophetkv_rag.cli.console import progress_bar
from prophetkv_rag.cli.database_settings import DatabaseSettings, save_settings
from prophetkv_rag.cli.engines import DatabaseEngine, open_transformers, open_vllm
from prophetkv_rag.cli.frameworks import import_chromadb, import_frameworks
from prophetkv_rag.cli.planning import CachePlan, announce, plan_caches
from prophetkv_rag.cli.vllm_engine import check_vllm
from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.errors import InputError
from prophetkv_rag.text import shown_name, well_formed

if TYPE_CHECKING:
    from llama_index.core import VectorStoreIndex

    from prophetkv_rag.chroma import KVCachingCollection
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.store.disk import DiskStore

COLLECTION = "documents"
_BATCH = 1000  # records that are read at once


def check_writable(path: Path) -> None:
    """Raise `InputError` if a database cannot be made at `path`; nothing is written."""
    if well_formed(str(path.resolve())) != str(path.resolve()):
        msg = f"the database directory {shown_name(path)} cannot be used: its path is not UTF-8; name another"
        raise InputError(msg)
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "cannot be written to" if existing.is_dir() else "is not a directory"
        msg = f"the database directory {path} cannot be used: {existing} {reason}"
        raise InputError(msg)


def check_packages(settings: DatabaseSettings) -> None:
    """Raise `InputError` for what would keep a database from being opened once models are downloaded for it.

    That is an optional package it needs and that is not installed, or a key that is not there.
    """
    from prophetkv_rag.store.encryption import load_key
    from prophetkv_rag.store.remote import RemoteFiles

    import_frameworks()
    load_key(settings.key_file or None)
    if settings.remote:
        RemoteFiles(settings.remote)
    if settings.engine == "vllm":
        check_vllm()


@dataclass(slots=True)
class Database:
    """An open database with its model: everything that `index` and `ask` need."""

    path: Path
    settings: DatabaseSettings
    engine: DatabaseEngine
    store: DiskStore
    close_engine: Callable[[], None]
    collection: KVCachingCollection
    index: VectorStoreIndex
    client: Any

    @property
    def own_engine(self) -> ProphetKVEngine:
        """The engine, where it is not vLLM."""
        assert self.settings.engine == "transformers", "checked by the commands that need it"
        return cast("ProphetKVEngine", self.engine)

    def bring_caches_up_to_date(self, beforehand: Callable[[Database], None] | None = None) -> int:
        """Compute the caches of all chunks again if they belong to another model or are gone; returns how many.

        Afterwards the database remembers this model. `beforehand` is called first, if there is something to compute,
        and may have others do that.
        """
        count = self.collection.count()
        fingerprint = self.engine.identity.fingerprint
        is_current = self.settings.cached_for == fingerprint and (len(self.engine.chunk_index) > 0 or count == 0)
        if not is_current and count:
            texts = self.collection.get(include=["documents"])["documents"]
            self.plan(texts, is_renewed=True, is_timed=beforehand is None)
            self.settings = replace(self.settings, cached_for="")  # interrupted, it is neither model's
            save_settings(self.path, self.settings)
            if beforehand is not None:
                beforehand(self)
            with progress_bar("computing the KV caches for this model", count) as advance:
                self.collection.progress = lambda done, total: advance(1)
                try:
                    self.collection.cache_existing()
                finally:
                    self.collection.progress = None
            self.complete_encoding()
        self.settings = replace(self.settings, cached_for=fingerprint)
        save_settings(self.path, self.settings)
        return 0 if is_current else count

    def plan(self, texts: Iterable[str | None], *, is_renewed: bool = False, is_timed: bool = True) -> CachePlan:
        """Say what the caches of these chunks will take, as far as they are missing; `NoRoomError` if they do not fit.

        `is_renewed` says that those of another model make room for them, `is_timed` that this process computes them.
        """
        plan = plan_caches(self.engine, self.store, (text or "" for text in texts), is_timed=is_timed)
        held = self.store.stats().nbytes
        kept, replaced = (0, held) if is_renewed else (held, 0)
        announce(plan, self.settings, self.path, held=kept, replaced=replaced)
        return plan

    def complete_encoding(self, *, refresh: bool = False) -> None:
        """Encode what has lost a chunk it stood behind, and do the second pass of an encoding behind neighbours."""
        encoding = self.engine.library.encoding
        if (
            encoding.kind == "previous" and not self.engine.store.failures.caches
        ):  # a full disk has no room for these either
            self.collection.cache_existing()
        if encoding.num_neighbours:
            title = "encoding chunks behind their neighbours"
            with progress_bar(title, self.collection.count()) as advance:
                done = 0

                def progress(now: int, total: int) -> None:
                    nonlocal done
                    advance(now - done)
                    done = now

                self.collection.encode_behind_neighbours(progress, refresh=refresh)

    def add_second_caches(self, progress: Callable[[int, int], None]) -> None:
        """Compute what chunks are read from where a prompt begins with them; see `ChunkLibrary.add_second`."""
        for offset in range(0, self.collection.count(), _BATCH):
            texts = self.collection.get(limit=_BATCH, offset=offset, include=["documents"])["documents"]
            self.engine.library.add_second((text for text in texts if text and text.strip()), progress=progress)

    def close(self) -> None:
        """Release Chroma's and the caches' files."""
        self.close_engine()
        if hasattr(self.client, "close"):  # newer releases of Chroma
            self.client.close()


def open_database(
    path: Path,
    settings: DatabaseSettings,
    *,
    config: ProphetKVConfig | None = None,
    ram_bytes: int | None = None,
    device: str = "auto",
    connector: dict[str, Any] | None = None,
) -> Database:
    """Open or make the database at `path` with the model that `settings` name; the model is loaded first.

    Args:
        path: Of the database.
        settings: Its own, or what it is to have.
        config: Of the engine, but for what the database says.
        ram_bytes: Bounds the RAM tier; by default a quarter of the memory that is free then.
        device: Where the model runs.
        connector: Fields of `ConnectorSettings`, where vLLM is the engine; the four before are not for it.

    Raises:
        InputError: If an optional package is missing, the caches are encrypted and their key is not there, or the
            directory cannot be used by Chroma.
        UnknownModelError, UnsupportedModelError: If the model cannot be loaded or used.
        StoreError: If the chunk caches' directory cannot be used.
    """
    frameworks = import_frameworks()
    check_writable(path)
    directory = path.resolve()  # Chroma tells databases of one process apart by the path as it is spelt
    from prophetkv_rag.chroma import KVCachingCollection

    if settings.engine == "vllm":
        opened = open_vllm(directory, settings, connector or {})
    else:
        opened = open_transformers(directory, settings, frameworks, config=config, ram_bytes=ram_bytes, device=device)
    try:
        client, chroma_collection = open_chroma(directory)
        collection = KVCachingCollection(chroma_collection, opened.engine, in_background=False)
    except BaseException:
        opened.close()
        raise
    vector_store = frameworks.vector_store(chroma_collection=collection)
    # LlamaIndex counts tokens with a global tokenizer; ours is the only model of this process.
    frameworks.set_global_tokenizer(token_counter(opened.engine.tokenizer))
    index = frameworks.index.from_vector_store(vector_store, embed_model=frameworks.embedding())
    return Database(path, settings, *opened, collection, index, client)


def token_counter(tokenizer: Any) -> Callable[[str], list[int]]:
    """What LlamaIndex calls a tokenizer: a function from text to token ids, without special tokens."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(well_formed(text), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode


def open_chroma(path: Path) -> tuple[Any, Any]:
    """Return the database's Chroma client and its collection, made if need be; `InputError` if that is not possible."""
    chromadb = import_chromadb()
    from chromadb.config import Settings

    try:
        client = chromadb.PersistentClient(path=str(path), settings=Settings(anonymized_telemetry=False))
        settings = {"embedding_function": None, "metadata": {"hnsw:space": "cosine"}}
        return client, client.get_or_create_collection(COLLECTION, **settings)
    except Exception as error:  # chromadb raises its own, sqlite's and Rust's errors
        msg = f"Chroma cannot open the database at {path}: {error}"
        raise InputError(msg) from error
