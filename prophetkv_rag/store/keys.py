"""What a cache key may look like. Keys become file names, so nothing else is let through."""

from __future__ import annotations

import re

from prophetkv_rag.errors import InputError

_KEY = re.compile(r"[0-9a-f]{64}")


def is_key(key: object) -> bool:
    """Whether `key` is a cache key: a string of 64 lower-case hex digits."""
    return isinstance(key, str) and _KEY.fullmatch(key) is not None


def check_key(key: str) -> str:
    """Return `key`, or raise `InputError` if it is not a cache key."""
    if not is_key(key):
        msg = f"{key!r} is not a cache key: 64 lower-case hex digits, as CacheIdentity.key() makes them"
        raise InputError(msg)
    return key


def chunk_owner(chunk: str) -> str:
    """Return the owner as which a chunk refers to other caches of its text; see `ChunkStore.keep_with`."""
    return f"chunk:{chunk}"
