"""Where a Chroma client's chunk caches belong: beside Chroma's own files, as far as those are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prophetkv_rag.chroma.records import cache_keys
from prophetkv_rag.errors import InputError
from prophetkv_rag.vector_stores import batches

if TYPE_CHECKING:
    from prophetkv_rag.store import ChunkStore

_DEFAULTS = {"policy": "eager", "eviction": "value", "blob_format": "exact"}
_PAGE = 1000  # ids in one read; SQLite, behind Chroma, takes at most 32,766 variables


def default_blob_directory(client_or_collection: Any) -> Path | None:
    """Return `<persist_directory>/prophetkv` for a `PersistentClient` or a collection of one.

    Chroma leaves folders that it does not know alone. `None` for an ephemeral client, and for an HTTP client as well:
    its server's files may be on another machine, while caches belong on the one that has the model, so the caller
    must name a directory.
    """
    settings = _settings(client_or_collection)
    if _is_remote(settings) or not settings.is_persistent:
        return None
    return Path(settings.persist_directory) / "prophetkv"


def open_store(client: Any, directory: str | Path | None = None, **settings: Any) -> ChunkStore:
    """Open the store that fits a Chroma client.

    Args:
        client: A chromadb client (or a collection of one).
        directory: Where to keep the caches; by default beside the data of a `PersistentClient`, and in memory for an
            `EphemeralClient`.
        **settings: Limits, policy and format of a store on disk, see `DiskStore`; with `remote="s3://bucket/prefix"` a
            tier behind it, see `TieredStore`. In memory there is one limit, the smaller of `ram_bytes` and `max_bytes`.

    Raises:
        InputError: For an HTTP client without a directory, and for an `EphemeralClient` without one and with a setting
            that memory does not have.
        StoreError: If the directory cannot be used.
    """
    if directory is None:
        directory = default_blob_directory(client)
    if directory is None and _is_remote(_settings(client)):
        msg = "a Chroma HTTP client has no directory on this machine; say where chunk caches go with directory=..."
        raise InputError(msg)
    if directory is None:
        limits = [settings.pop(name, None) for name in ("ram_bytes", "max_bytes")]
        settings.pop("encryption_key", None)  # nothing is at rest
        others = [name for name, value in settings.items() if value not in (None, _DEFAULTS.get(name))]
        if others:
            msg = (
                f"{', '.join(others)}: an EphemeralClient has no disk, so its caches are in memory; say where they go "
                "with directory=..., or leave that out"
            )
            raise InputError(msg)
        from prophetkv_rag.store import MemoryStore

        return MemoryStore(min((limit for limit in limits if limit is not None), default=None))
    from prophetkv_rag.store.disk import open_disk_store

    return open_disk_store(directory, **settings)


def live_references(client: Any) -> dict[str, set[str]]:
    """Return, for every collection of a Chroma client (by id), the cache keys that its records carry.

    This is what `store.disk.gc` goes by.
    """
    live: dict[str, set[str]] = {}
    for collection in client.list_collections():
        keys = live[str(collection.id)] = set()
        ids = collection.get(include=[])["ids"]
        for part in batches(ids, _PAGE):
            keys.update(cache_keys(collection.get(ids=part, include=["metadatas"])["metadatas"]))
    return live


def _settings(client_or_collection: Any) -> Any:
    if not hasattr(client_or_collection, "get_settings"):  # a Collection has no public way to its client
        client_or_collection = client_or_collection._client
    return client_or_collection.get_settings()


def _is_remote(settings: Any) -> bool:
    return "fastapi" in str(settings.chroma_api_impl).lower()
