"""The engine of a database: a model of transformers in this process, or vLLM; and the store of its caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from prophetkv_rag.cli.console import status
from prophetkv_rag.cli.database_settings import BLOB_DIRECTORY, DatabaseSettings
from prophetkv_rag.cli.frameworks import Frameworks
from prophetkv_rag.cli.model_choice import load_options
from prophetkv_rag.cli.vllm_engine import connector_settings, start_vllm
from prophetkv_rag.config import ProphetKVConfig

if TYPE_CHECKING:
    from prophetkv_rag.chunks import AddsChunks
    from prophetkv_rag.prompt import ChunkIndex, Tokens
    from prophetkv_rag.store import CacheIdentity, ChunkStore
    from prophetkv_rag.store.disk import DiskStore


class DatabaseEngine(Protocol):
    """What the commands need of either engine; both are a `CachingEngine`, too."""

    identity: CacheIdentity
    tokens: Tokens
    tokenizer: Any
    config: ProphetKVConfig
    context_window: int

    @property
    def store(self) -> ChunkStore:
        """Keeps the caches."""

    @property
    def library(self) -> AddsChunks:
        """The chunks that it knows."""

    @property
    def chunk_index(self) -> ChunkIndex:
        """Finds the texts of stored chunks in prompts."""


class OpenEngine(NamedTuple):
    """An engine, the store of its caches, and what closes both."""

    engine: Any
    store: DiskStore
    close: Callable[[], None]


def open_transformers(
    directory: Path,
    settings: DatabaseSettings,
    frameworks: Frameworks,
    *,
    config: ProphetKVConfig | None,
    ram_bytes: int | None,
    device: str,
) -> OpenEngine:
    """Load the model of a database; see `open_database`."""
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.model import load_model
    from prophetkv_rag.store.disk import must_be_unlocked, open_disk_store
    from prophetkv_rag.store.encryption import load_key

    load = load_options(settings.dtype, device)
    options: Any = settings.store_options()
    options["ram_bytes"] = ram_bytes
    options["encryption_key"] = load_key(options["encryption_key"])  # before a model is loaded
    with status(f"loading {Path(settings.model).name}"):
        model, tokenizer = load_model(settings.model, **load)
        config = replace(
            config or ProphetKVConfig(),
            prompt_template=frameworks.prompt_template_of(tokenizer) if settings.behind_prompt else None,
            lead_in=settings.lead_in or None,
            lead_in_tokens=settings.lead_in_tokens,
            encoding=settings.encoding,
            strategy=settings.strategy,
            recompute_ratio=settings.recompute_ratio,
        )
        store = open_disk_store(directory / BLOB_DIRECTORY, **options)
        must_be_unlocked(store.files)
        return OpenEngine(ProphetKVEngine(model, tokenizer, config=config, store=store), store, store.close)


def open_vllm(directory: Path, settings: DatabaseSettings, connector: dict[str, Any]) -> OpenEngine:
    """Load the model of a database in vLLM; see `start_vllm`. `connector` overrides what the database says."""
    fields = connector_settings(settings) | connector
    engine = start_vllm(settings.model, directory / BLOB_DIRECTORY, settings.vllm_args, **fields)
    return OpenEngine(engine, engine.store, engine.close)
