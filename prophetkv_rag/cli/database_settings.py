"""What a database was made with, so that `ask` uses what `index` used: one JSON file in its directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prophetkv_rag.config import LEAD_IN_TOKENS, ProphetKVConfig
from prophetkv_rag.errors import InputError
from prophetkv_rag.text import decode_text

DEFAULT_DATABASE = Path(".prophetkv")
DEFAULT_CHUNK_SIZE = 256
SETTINGS_FILE = "prophetkv-rag.json"
BLOB_DIRECTORY = "prophetkv"
DEFAULTS = ProphetKVConfig()


@dataclass(frozen=True, slots=True)
class DatabaseSettings:
    """What a database was made with.

    Attributes:
        model: Local directory or hub name.
        chunk_size: Tokens per chunk.
        cached_for: Fingerprint of the model that the caches belong to; "" while they are being computed.
        lead_in: What chunks are encoded behind (`ProphetKVConfig.lead_in`); "" for nothing.
        behind_prompt: Whether that stands behind the opening of the prompt that `ask` sends
            (`ProphetKVConfig.prompt_template`); databases made by early versions stand behind the chat template's.
        cache_limit: Most bytes of caches on disk, or `None`.
        limit_chosen: Whether that was chosen from what was free, and not by the user: then indexing stops where it is
            not enough, and evicts nothing.
        dtype: What the model computes in: `"auto"`, or a dtype's name.
        namespace_limit: Most bytes of each namespace's caches on disk, or `None`.
        encoding: Which other chunks they are encoded behind (`ProphetKVConfig.encoding`).
        lead_in_tokens: Longest lead-in: the chunk size, in databases of this version.
        strategy: What questions are answered with (`ProphetKVConfig.strategy`), and
        recompute_ratio: the share of the chunk tokens that is recomputed; `None` for the default.
        cache_format: How caches are written (`store.blobs.formats`).
        cache_policy: `"eager"` or `"on_first_use"` (`DiskStore`).
        remote: URL of the tier behind the disk (`store.disk.tiered`); "" for none.
        remote_limit: Most bytes of caches there, or `None`.
        remote_timeout: Seconds that a query waits for it; `None` for the default.
        key_file: Path of the file with the key that caches are encrypted with; "" for none (then the environment
            variable `PROPHETKV_CACHE_KEY` is looked at).
        engine: Who computes the caches, and answers: `"transformers"` or `"vllm"`.
        vllm_args: Keywords of vLLM's `AsyncEngineArgs`.
        prompt_template: With vLLM: what clients' prompts look like (`ProphetKVConfig.prompt_template`).
    """

    model: str
    chunk_size: int
    cached_for: str = ""
    lead_in: str = ""
    behind_prompt: bool = False
    cache_limit: int | None = None
    cache_format: str = "exact"
    cache_policy: str = "eager"
    remote: str = ""
    remote_limit: int | None = None
    remote_timeout: float | None = None
    key_file: str = ""
    namespace_limit: int | None = None
    encoding: str = "plain"
    lead_in_tokens: int = LEAD_IN_TOKENS
    strategy: str = DEFAULTS.strategy
    recompute_ratio: float | None = None
    limit_chosen: bool = False
    dtype: str = "auto"
    engine: str = "transformers"
    vllm_args: dict[str, Any] = field(default_factory=dict)
    prompt_template: str | Sequence[Mapping[str, str]] | None = None

    def store_options(self) -> dict[str, Any]:
        """Return what `open_disk_store` is called with."""
        options: dict[str, Any] = {
            "max_bytes": self.cache_limit,
            "namespace_max_bytes": self.namespace_limit,
            "blob_format": self.cache_format,
            "policy": self.cache_policy,
            "encryption_key": self.key_file or None,
        }
        if self.remote:
            options["remote"] = self.remote
            options["remote_max_bytes"] = self.remote_limit
            options["remote_timeout_s"] = self.remote_timeout
        return options


def lead_in_of(text: str, num_tokens: int = LEAD_IN_TOKENS) -> str:
    """Return as much of a document as a lead-in can use (the engine cuts it to its number of tokens)."""
    return text[: 8 * num_tokens]


def read_lead_in(wanted: str | None, num_tokens: int, otherwise: str) -> str:
    """Return the lead-in that `--lead-in` says; `InputError` if its file is no text."""
    if wanted is None:
        return otherwise
    if wanted == "none":
        return ""
    try:
        return lead_in_of(decode_text(Path(wanted).read_bytes()), num_tokens)
    except (OSError, InputError) as error:
        msg = f"--lead-in: {wanted} cannot be read as text ({error}); give a text file, or 'none'"
        raise InputError(msg) from error


def find_settings(path: Path) -> DatabaseSettings | None:
    """Return the settings of the database at `path`, or `None` if there is none yet.

    Raises:
        InputError: If the settings file is there but cannot be read.
    """
    file = path / SETTINGS_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return DatabaseSettings(
            model=str(values["model"]),
            chunk_size=int(values["chunk_size"]),
            cached_for=str(values.get("cached_for", "")),
            lead_in=str(values.get("lead_in", "")),
            behind_prompt=bool(values.get("behind_prompt", False)),
            cache_limit=None if values.get("cache_limit") is None else int(values["cache_limit"]),
            cache_format=str(values.get("cache_format", "exact")),
            cache_policy=str(values.get("cache_policy", "eager")),
            remote=str(values.get("remote", "")),
            remote_limit=None if values.get("remote_limit") is None else int(values["remote_limit"]),
            remote_timeout=None if values.get("remote_timeout") is None else float(values["remote_timeout"]),
            key_file=str(values.get("key_file", "")),
            namespace_limit=None if values.get("namespace_limit") is None else int(values["namespace_limit"]),
            encoding=str(values.get("encoding", "plain")),
            lead_in_tokens=int(values.get("lead_in_tokens", LEAD_IN_TOKENS)),
            strategy=str(values.get("strategy", DEFAULTS.strategy)),
            recompute_ratio=None if values.get("recompute_ratio") is None else float(values["recompute_ratio"]),
            limit_chosen=bool(values.get("limit_chosen", False)),
            dtype=str(values.get("dtype", "auto")),
            engine=str(values.get("engine", "transformers")),
            vllm_args=dict(values.get("vllm_args", {})),
            prompt_template=values.get("prompt_template"),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{file} cannot be read ({type(error).__name__}: {error}); delete {path} and index again"
        raise InputError(msg) from error


def require_settings(path: Path) -> DatabaseSettings:
    """Return the settings of the database at `path`; `InputError` if there is none."""
    settings = find_settings(path)
    if settings is None:
        msg = f"there is no database at {path}; make one with: prophetkv-rag index DIR --db {path}"
        raise InputError(msg)
    return settings


def require_transformers(settings: DatabaseSettings, path: Path) -> None:
    """Raise `InputError` if a database's caches are vLLM's: all of them would be computed again."""
    if settings.engine == "vllm":
        msg = (
            f"the KV caches of the database at {path} are vLLM's: serve it (prophetkv-rag serve --database {path}), or "
            "have all of them computed again by transformers (prophetkv-rag index DIR --engine transformers --db "
            f"{path})"
        )
        raise InputError(msg)


def save_settings(path: Path, settings: DatabaseSettings) -> None:
    """Write the settings in one step, making the directory if need be; `InputError` if it cannot be written to."""
    from prophetkv_rag.store import write_file

    try:
        path.mkdir(parents=True, exist_ok=True)
        write_file(path / SETTINGS_FILE, json.dumps(asdict(settings), indent=1).encode())
    except OSError as error:
        msg = f"cannot write to the database directory {path}: {error.strerror or error}"
        raise InputError(msg) from error
