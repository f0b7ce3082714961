"""Options of `index` that say how much disk KV caches may take, and how they are written."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.cli.database_settings import DatabaseSettings

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_POLICIES = ("eager", "on_first_use")


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """What was given on the command line; "none" for no remote tier, or no limit."""

    url: str | None
    limit: str | None
    timeout_s: float | None


def parse_size(text: str) -> int | None:
    """Return bytes for "20GB", "500 MB", "1e6" or "none" (`None`).

    Raises:
        InputError: If it is no size.
    """
    if text == "none":
        return None
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?([kmgt]?)b?", text.strip().lower())
    try:
        return int(float(found[1]) * _UNITS[found[2]]) if found else int(text)
    except (ValueError, OverflowError) as error:
        msg = f"{text!r} is no size; give for example 20GB, 500MB, or 'none' for no limit"
        raise InputError(msg) from error


def with_cache_options(
    settings: DatabaseSettings,
    remembered: DatabaseSettings | None,
    limit: str | None,
    blob_format: str | None,
    policy: str | None,
    remote: RemoteOptions | None = None,
    key_file: str | None = None,
    namespace_limit: str | None = None,
) -> DatabaseSettings:
    """Return the settings with what was asked for, else what the database remembers; `InputError` for bad values."""
    if policy is not None and policy not in _POLICIES:
        msg = f"--cache-policy {policy!r} is not known; allowed: {', '.join(_POLICIES)}"
        raise InputError(msg)
    if blob_format is not None:
        from prophetkv_rag.store.blobs import check_format

        check_format(blob_format)
    base = remembered or settings
    settings = replace(
        settings,
        cache_limit=base.cache_limit if limit is None else parse_size(limit),
        limit_chosen=base.limit_chosen and limit is None,
        namespace_limit=base.namespace_limit if namespace_limit is None else parse_size(namespace_limit),
        cache_format=blob_format or base.cache_format,
        cache_policy=policy or base.cache_policy,
        remote=base.remote,
        remote_limit=base.remote_limit,
        remote_timeout=base.remote_timeout,
        key_file=base.key_file if key_file is None else "" if key_file == "none" else str(Path(key_file).absolute()),
    )
    return settings if remote is None else _with_remote(settings, remote)


def _with_remote(settings: DatabaseSettings, remote: RemoteOptions) -> DatabaseSettings:
    url = settings.remote if remote.url is None else remote.url
    url = "" if url == "none" else url
    if not url and (remote.limit is not None or remote.timeout_s is not None):
        msg = "--remote-limit and --remote-timeout go with --remote URL"
        raise InputError(msg)
    if url and remote.url is not None:
        from prophetkv_rag.store.remote import RemoteFiles

        RemoteFiles(url)
    return replace(
        settings,
        remote=url,
        remote_limit=settings.remote_limit if remote.limit is None else parse_size(remote.limit),
        remote_timeout=settings.remote_timeout if remote.timeout_s is None else remote.timeout_s,
    )
