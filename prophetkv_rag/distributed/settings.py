"""What a worker is made from, as it travels between machines: plain data, no key and no weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from prophetkv_rag.config import ProphetKVConfig


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is made from.

    Attributes:
        model: Directory (the same on every machine) or hub name (which every machine has in its cache).
        dtype: What the model computes in: `"auto"`, or a dtype's name.
        device: Where it runs; `"auto"` is a GPU if Ray gives the worker one.
        config: The caller's settings of the engine.
        fingerprint: What the worker's caches must be of: the caller's own.
        owner: Who refers to the chunks, in the store's words.
        directory: The store's directory, of a caller on the same machine; `None` where the remote tier is in between.
        store: Arguments of `open_disk_store`; the key of encrypted caches is named by the path of its file.
        version: Of this package: others may make other caches.
    """

    model: str
    dtype: str
    device: str
    config: ProphetKVConfig
    fingerprint: str
    owner: str
    directory: str | None
    store: dict[str, Any]
    version: str = field(default_factory=lambda: own_version())


def own_version() -> str:
    """Return this package's version, as it is installed."""
    return version("prophetkv-rag")
