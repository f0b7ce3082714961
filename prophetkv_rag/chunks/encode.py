"""Index time: run chunks through the model, behind the encoding prefix, and keep their un-rotated KV caches.

Between the prefix and a chunk other chunks may stand, by their caches: joined and rotated to where they stand, they are
what the chunk attends to; only the chunk itself is run (FusionRAG, arXiv 2601.12904, section 4.1, for neighbours).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from prophetkv_rag.errors import ContextWindowError, UnsupportedModelError
from prophetkv_rag.model import (
    EncodeBehindPass,
    EncodePass,
    ModelSupport,
    PassJob,
    RopeTables,
    Runner,
)
from prophetkv_rag.store import ALONE, Behind, CacheIdentity, ChunkCache

Layers = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Rotated keys and values, `[Hkv, n, D]` per layer."""


@dataclass(frozen=True, slots=True)
class EncodingPrefix:
    """The encoding prefix, computed once per engine."""

    input_ids: tuple[int, ...]
    layers: Layers

    def first(self, length: int) -> EncodingPrefix | None:
        """Return its first tokens as a prefix of their own (what follows leaves no trace in them); `None` for none."""
        layers = tuple((keys[:, :length], values[:, :length]) for keys, values in self.layers)
        return EncodingPrefix(self.input_ids[:length], layers) if length else None


@dataclass(frozen=True, slots=True)
class Job:
    """A chunk to encode: its token ids, and the caches of the chunks before it, in order; `behind` says which."""

    input_ids: Sequence[int]
    caches: Sequence[ChunkCache] = ()
    behind: Behind = ALONE


def encode_prefix(runner: Runner, support: ModelSupport, prefix_ids: Sequence[int]) -> EncodingPrefix | None:
    """Encode the prefix that every chunk stands behind; `None` for an empty one. The caller holds the model's lock."""
    if not prefix_ids:
        return None
    layers = _run(runner, support, torch.tensor([list(prefix_ids)], device=runner.device), None)
    tables = RopeTables(torch.arange(len(prefix_ids), device=runner.device))
    rotated = tuple(
        (tables.rotate(layer.keys[0], found.rotation), layer.values[0])
        for layer, found in zip(layers, support.layers, strict=True)
    )
    return EncodingPrefix(tuple(prefix_ids), rotated)


def check_length(name: str, input_ids: Sequence[int], prefix_ids: Sequence[int], window: int) -> None:
    """Raise `ContextWindowError`, which says `name`, for a chunk that does not fit a window behind the prefix."""
    total = len(prefix_ids) + len(input_ids)
    if total > window:
        msg = (
            f"{name} has {len(input_ids)} tokens, with the encoding prefix {total}, but the context window "
            f"is {window}; split it into smaller chunks"
        )
        raise ContextWindowError(msg)


def check_dtype(cache: ChunkCache, identity: CacheIdentity) -> None:
    """Raise `UnsupportedModelError` for a cache of another dtype than its key says, which must not be stored."""
    if not cache.is_of(identity.dtype):
        msg = (
            f"the model gives keys and values of {cache.keys[0].dtype} now, and gave {identity.dtype} when this engine "
            "was made; was its forward wrapped in autocast since? Make a new engine"
        )
        raise UnsupportedModelError(msg)


def encode_chunks(
    runner: Runner,
    support: ModelSupport,
    prefix: EncodingPrefix | None,
    chunks: Sequence[Sequence[int]],
    *,
    batch_tokens: int,
) -> Iterator[tuple[int, ChunkCache]]:
    """Encode chunks in batches of similar length.

    Args:
        runner: Runs the language model.
        support: The probe's findings.
        prefix: What every chunk is encoded behind.
        chunks: Token ids of each chunk, none empty.
        batch_tokens: Upper bound of tokens in a batch, padding included (one chunk is always allowed).

    Yields:
        (index into `chunks`, its cache: K/V on the model's device, token ids on the CPU), batch by batch, the longest
        chunks first. The caller holds the model's lock while a batch is computed.
    """
    for batch in _batches([len(chunk) for chunk in chunks], batch_tokens):
        longest = max(len(chunks[index]) for index in batch)
        # Padding stands to the right of every real token, so causal attention never sees it.
        padded = [[*chunks[index], *[0] * (longest - len(chunks[index]))] for index in batch]
        layers = _run(runner, support, torch.tensor(padded, device=runner.device), prefix)
        for row, index in enumerate(batch):
            yield index, _cut(layers, row, chunks[index])


def encode_behind(
    runner: Runner, support: ModelSupport, prefix: EncodingPrefix | None, jobs: Sequence[Job]
) -> list[ChunkCache]:
    """Encode chunks, each behind the prefix and the caches of its own, in one batch.

    Args:
        runner: Runs the language model; the caller holds its lock.
        support: The probe's findings.
        prefix: What stands before all else.
        jobs: The chunks. What their caches were encoded behind does not matter here.

    Returns:
        Their caches, in order; see `encode_chunks`.
    """
    longest = max(len(job.input_ids) for job in jobs)
    padded = [[*job.input_ids, *[0] * (longest - len(job.input_ids))] for job in jobs]
    prefixes = [_joined(runner, support, prefix, job.caches) for job in jobs]
    layers = _run(runner, support, torch.tensor(padded, device=runner.device), prefixes)
    return [_cut(layers, row, job.input_ids, job.behind) for row, job in enumerate(jobs)]


def _cut(layers: Sequence[CacheLayerMixin], row: int, input_ids: Sequence[int], behind: Behind = ALONE) -> ChunkCache:
    length = len(input_ids)
    return ChunkCache(
        torch.tensor(list(input_ids), dtype=torch.int32),
        keys=tuple(layer.keys[row, :, :length].contiguous() for layer in layers),
        values=tuple(layer.values[row, :, :length].contiguous() for layer in layers),
        behind=behind,
    )


def _joined(
    runner: Runner, support: ModelSupport, prefix: EncodingPrefix | None, caches: Sequence[ChunkCache]
) -> Layers | None:
    """The prefix's rows and then the caches' own, keys rotated to where they stand now, layer by layer."""
    if not caches:
        return None if prefix is None else prefix.layers
    first = 0 if prefix is None else len(prefix.input_ids)
    starts = [first]
    for cache in caches:
        starts.append(starts[-1] + cache.num_tokens)
    end, device, dtype = starts.pop(), runner.device, getattr(torch, support.dtype)
    tables = RopeTables(torch.arange(first, end, device=device))
    caches = [cache.ahead(device) for cache in caches]
    joined = []
    for index, found in enumerate(support.layers):
        keys = torch.empty(found.num_key_value_heads, end, found.head_dim, dtype=dtype, device=device)
        values = torch.empty(found.num_key_value_heads, end, found.value_head_dim, dtype=dtype, device=device)
        if prefix is not None:
            keys[:, :first], values[:, :first] = prefix.layers[index]
        sources = [cache.source(index).to(device) for cache in caches]
        tables.gather(keys, values, sources, starts, found.rotation)
        joined.append((keys, values))
    return tuple(joined)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group indices by length, longest first, so that padding is small and an out-of-memory shows at once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class _CaptureLayer(DynamicLayer):
    """Keeps the rows of the one update it gets, without the copy that joining to an empty cache would make."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def _run(
    runner: Runner,
    support: ModelSupport,
    input_ids: torch.Tensor,
    prefix: EncodingPrefix | Sequence[Layers | None] | None,
) -> list[CacheLayerMixin]:
    """Run chunks behind one prefix for all, or one for each."""
    layers: list[CacheLayerMixin] = [_CaptureLayer() for _ in support.layers]
    seq_len, device = input_ids.shape[1], input_ids.device
    encode: EncodePass | EncodeBehindPass
    if prefix is None or isinstance(prefix, EncodingPrefix):
        shared = None if prefix is None else prefix.layers
        encode = EncodePass(support.layers, seq_len=seq_len, prefix=shared, device=device)
    else:
        encode = EncodeBehindPass(support.layers, seq_len=seq_len, prefixes=prefix, device=device)
    runner.run([PassJob(encode, input_ids, torch.zeros_like(input_ids), layers)])
    return layers
