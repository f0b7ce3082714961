"""Index time: run chunks through the model, alone behind the encoding prefix, and keep their un-rotated KV caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from prophetkv_rag.errors import ContextWindowError, UnsupportedModelError
from prophetkv_rag.model import EncodePass, ModelSupport, cache_of, model_lock, run_pass
from prophetkv_rag.store import CacheIdentity, ChunkCache


@dataclass(frozen=True, slots=True)
class EncodingPrefix:
    """Rotated keys and values of the encoding prefix, `[Hkv, prefix_len, D]` per layer, computed once per engine."""

    input_ids: tuple[int, ...]
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]


def encode_prefix(model: Any, support: ModelSupport, prefix_ids: Sequence[int]) -> EncodingPrefix | None:
    """Encode the prefix that every chunk stands behind; `None` for an empty one."""
    if not prefix_ids:
        return None
    with model_lock(model):
        encode, layers = _run(model, support, torch.tensor([list(prefix_ids)], device=model.device), None)
    rotated = tuple(
        (encode.tables.rotate(layer.keys[0], found.rotation), layer.values[0])
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
    model: Any,
    support: ModelSupport,
    prefix: EncodingPrefix | None,
    chunks: Sequence[Sequence[int]],
    *,
    batch_tokens: int,
) -> Iterator[tuple[int, ChunkCache]]:
    """Encode chunks in batches of similar length.

    Args:
        model: The language model.
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
        _, layers = _run(model, support, torch.tensor(padded, device=model.device), prefix)
        for row, index in enumerate(batch):
            length = len(chunks[index])
            yield (
                index,
                ChunkCache(
                    input_ids=torch.tensor(list(chunks[index]), dtype=torch.int32),
                    keys=tuple(layer.keys[row, :, :length].contiguous() for layer in layers),
                    values=tuple(layer.values[row, :, :length].contiguous() for layer in layers),
                ),
            )


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
    model: Any, support: ModelSupport, input_ids: torch.Tensor, prefix: EncodingPrefix | None
) -> tuple[EncodePass, list[CacheLayerMixin]]:
    layers: list[CacheLayerMixin] = [_CaptureLayer() for _ in support.layers]
    encode = EncodePass(
        support.layers,
        seq_len=input_ids.shape[1],
        prefix=None if prefix is None else prefix.layers,
        device=input_ids.device,
    )
    run_pass(model, encode, input_ids=input_ids, position_ids=torch.zeros_like(input_ids), cache=cache_of(layers))
    return encode, layers
