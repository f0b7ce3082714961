"""What the KV caches of a corpus will take, said before they are computed, and whether there is room for them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prophetkv_rag.cli.console import progress_console, shown_bytes, shown_duration
from prophetkv_rag.cli.database_settings import BLOB_DIRECTORY, DatabaseSettings
from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.cli.engines import DatabaseEngine
    from prophetkv_rag.store.disk import DiskStore

_MEASURED_TOKENS = 128
"""Tokens that are run for the speed, on a CPU, where it was never measured; a tenth of what there is, or it is not."""
_ROW_TOKENS = 256


class NoRoomError(InputError):
    """The caches of a corpus do not fit."""


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Caches that are still to be computed.

    Attributes:
        chunks: How many, and
        tokens: the tokens in them.
        nbytes: Bytes on disk, in the database's format.
        seconds: About how long the model runs; `None` if that is not known.
        may_double: Whether chunks get a second cache when prompts begin with them, within the limit like all others.
    """

    chunks: int = 0
    tokens: int = 0
    nbytes: int = 0
    seconds: float | None = None
    may_double: bool = False


def choose_limit(settings: DatabaseSettings, db: Path) -> DatabaseSettings:
    """Return a new database's settings with a disk limit chosen from what is free, and say so."""
    from prophetkv_rag.store.disk import default_disk_bytes

    try:
        limit = default_disk_bytes(db / BLOB_DIRECTORY)
    except OSError:  # a file system that does not tell what is free
        return settings
    progress_console().print(
        f"KV caches may take {shown_bytes(limit)} in {db}, half of what is free there; --cache-limit SIZE changes that",
        markup=False,
        soft_wrap=True,
    )
    return replace(settings, cache_limit=limit, limit_chosen=True)


def plan_caches(engine: DatabaseEngine, store: DiskStore, texts: Iterable[str], *, is_timed: bool = True) -> CachePlan:
    """Return what `engine` has to compute for these chunks, as far as `store` lacks them.

    A model of this process may run briefly, for the speed; not if others compute them (`is_timed`), whose speed nobody
    knows.
    """
    missing: dict[str, list[int]] = {}
    for text in texts:
        if text.strip():
            input_ids = engine.tokens.chunk(text.strip())
            missing.setdefault(engine.identity.key(input_ids), input_ids)
    missing = {key: input_ids for key, input_ids in missing.items() if key not in store}
    if not missing:
        return CachePlan()
    lengths = [len(input_ids) for input_ids in missing.values()]
    shortest, longest = min(lengths), max(lengths)
    low, high = (_blob_bytes(engine, store, num_tokens) for num_tokens in (shortest, longest))
    slope = (high - low) / max(1, longest - shortest)
    nbytes = sum(low + slope * (length - shortest) for length in lengths)
    speed = store.catalog.seconds_per_token(engine.identity.fingerprint) if is_timed else None
    if is_timed and speed is None and store.policy == "eager" and hasattr(engine, "model"):
        speed = _measured_speed(engine, missing.values(), sum(lengths))
    passes = 2 if engine.library.encoding.kind == "neighbours" else 1  # alone first, then behind them
    seconds = None if speed is None or store.policy != "eager" else passes * speed * sum(lengths)
    may_double = engine.config.first_chunk == "opening" and engine.library.has_second
    return CachePlan(len(missing), sum(lengths), round(nbytes), seconds, may_double)


def announce(plan: CachePlan, settings: DatabaseSettings, path: Path, *, held: int, replaced: int = 0) -> None:
    """Say what is going to be computed, or that it does not fit.

    Args:
        plan: What is to be computed.
        settings: The database's.
        path: Its directory.
        held: Bytes of caches that are there already and stay.
        replaced: Bytes of caches that are given back meanwhile.

    Raises:
        NoRoomError: If there is no room on the disk, or within a limit that was not set on purpose, and no remote tier
            that takes the rest.
    """
    if not plan.chunks:
        return
    left = None if settings.cache_limit is None else max(0, settings.cache_limit - held)
    about = "" if plan.seconds is None else f" and about {shown_duration(plan.seconds)}"
    said = f"{plan.chunks:,} chunks of {plan.tokens:,} tokens: about {shown_bytes(plan.nbytes)}{about}"
    ending = ", less what the remote tier has" if settings.remote else ""
    if left is not None and plan.nbytes > left:
        if settings.limit_chosen and _must_fit(settings):
            raise NoRoomError(_over_limit(plan, settings, left))
        ending += f"; {shown_bytes(left)} are left of the limit of {shown_bytes(settings.cache_limit or 0)}"
        ending += ", the rest stays in the remote tier" if settings.remote else ", what is used most stays"
    free = _free(path)
    written = plan.nbytes if left is None else min(plan.nbytes, left)
    if free is not None and written > free + replaced:
        if _must_fit(settings):
            raise NoRoomError(_over_disk(plan, settings, free, path))
        ending += f"; {shown_bytes(free)} are free on the disk"
        ending += ", the rest goes to the remote tier alone" if settings.remote else ""
    if plan.may_double:
        ending += "; up to as much again comes with prompts that begin with these chunks"
    verb = "KV caches to compute" if settings.cache_policy == "eager" else "KV caches, when they are first asked for"
    progress_console().print(f"{verb}: {said}{ending}", markup=False, soft_wrap=True)


def _must_fit(settings: DatabaseSettings) -> bool:
    return settings.cache_policy == "eager" and not settings.remote


def _over_limit(plan: CachePlan, settings: DatabaseSettings, left: int) -> str:
    limit = settings.cache_limit or 0
    enough = _typed(limit - left + plan.nbytes + plan.nbytes // 20)
    return (
        f"{_needs(plan)}, and {shown_bytes(left)} are left of the limit of {shown_bytes(limit)}, which was chosen as "
        f"half of what was free. Give them more room (--cache-limit {enough}), {_smaller(settings)}or let what is used "
        f"most stay within it (--cache-limit {_typed(limit)})"
    )


def _over_disk(plan: CachePlan, settings: DatabaseSettings, free: int, path: Path) -> str:
    part = _typed(free // 2)
    return (
        f"{_needs(plan)}, and {shown_bytes(free)} are free at {path}. Make room, name another directory (--db), "
        f"{_smaller(settings)}or let what is used most stay within a part of it (--cache-limit {part})"
    )


def _typed(nbytes: int) -> str:
    """Return a size as an option takes it."""
    return shown_bytes(nbytes).replace(" ", "").replace(",", "")


def _needs(plan: CachePlan) -> str:
    return f"the KV caches do not fit: {plan.chunks:,} chunks of {plan.tokens:,} tokens need {shown_bytes(plan.nbytes)}"


def _smaller(settings: DatabaseSettings) -> str:
    smaller = "" if settings.cache_format in ("int8", "int4", "fp8") else "write them smaller (--cache-format int8), "
    later = "compute them when they are first asked for (--cache-policy on_first_use), "
    return smaller if settings.engine == "vllm" else f"{smaller}{later}"


def _free(path: Path) -> int | None:
    from prophetkv_rag.store.disk import free_disk

    try:
        return free_disk(path / BLOB_DIRECTORY)
    except OSError:
        return None


def _blob_bytes(engine: DatabaseEngine, store: DiskStore, num_tokens: int) -> int:
    """Return the size of a chunk's blob, of a chunk that is all zeros."""
    import torch

    from prophetkv_rag.store import Behind, ChunkCache
    from prophetkv_rag.store.blobs import encode_blob

    dtype = getattr(torch, engine.identity.dtype)

    def rows(heads: int, width: int) -> torch.Tensor:
        return torch.zeros(heads, num_tokens, width, dtype=dtype)

    key, widths = "0" * 64, engine.library.kv_widths
    cache = ChunkCache(
        torch.zeros(num_tokens, dtype=torch.int32),
        tuple(rows(heads, width) for heads, width, _ in widths),
        tuple(rows(heads, width) for heads, _, width in widths),
        Behind((key,) * max(engine.library.encoding.count, engine.library.encoding.num_neighbours)),
    )
    return len(store.files.seal(key, encode_blob(cache, key=key, fingerprint=key, blob_format=store.blob_format)))


def _measured_speed(engine: Any, chunks: Iterable[Sequence[int]], num_tokens: int) -> float | None:
    """Return the seconds that a token takes, or `None` where measuring it would be a good part of the work."""
    wanted = _MEASURED_TOKENS if engine.model.device.type == "cpu" else engine.config.index_batch_tokens
    if num_tokens < 10 * wanted:
        return None
    ids = [token for input_ids in chunks for token in input_ids][:wanted]
    width = min(_ROW_TOKENS, len(ids))
    rows = [ids[start : start + width] for start in range(0, len(ids) - width + 1, width)]
    _run(engine, [rows[0][:16]])
    started = time.perf_counter()
    _run(engine, rows)
    return (time.perf_counter() - started) / (width * len(rows))


def _run(engine: Any, rows: Sequence[Sequence[int]]) -> None:
    import torch

    from prophetkv_rag.model import backbone, own_state

    with own_state(), engine.model_lock, torch.no_grad():
        hidden: Any = backbone(engine.model)(input_ids=torch.tensor(rows, device=engine.model.device), use_cache=True)
        hidden.last_hidden_state[-1, -1, -1].item()  # a GPU is done when its numbers are here
