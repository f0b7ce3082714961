"""A chunk's KV cache and its identity: what is computed once at index time and found again at query time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prophetkv_rag.kernels import ops
from prophetkv_rag.once import once

LAYOUT_VERSION = 1
"""Bumped whenever the meaning of a stored tensor changes; part of every key, so old blobs are simply not found."""


@dataclass(frozen=True, slots=True)
class Behind:
    """Which other chunks stood before a chunk when it was encoded, and so left their trace in its cache.

    Attributes:
        keys: Keys of the chunks that stood there, in order: the last one right before it.
        through: Keys of chunks that left a trace in the caches of those, and so in this one.
        is_chained: Whether those caches were as they are stored, with the traces of others, and not made for this.
    """

    keys: tuple[str, ...] = ()
    through: tuple[str, ...] = ()
    is_chained: bool = False

    @property
    def traces(self) -> tuple[str, ...]:
        """Keys of all chunks that left a trace; a cache must not outlive any of them."""
        return (*self.through, *self.keys)


ALONE = Behind()
"""Of a chunk that was encoded behind the encoding prefix alone."""


@dataclass(frozen=True, slots=True)
class ChunkCache:
    """KV cache of one chunk, encoded behind the encoding prefix (the prefix's own rows are not included).

    Attributes:
        input_ids: `[num_tokens]`, int32, on the CPU.
        keys: One `[num_key_value_heads, num_tokens, head_dim]` per layer, **un-rotated**: as the model makes them at
            position 0 (after k-norm, and with the RoPE's attention scaling), to be rotated once at query time.
        values: One `[num_key_value_heads, num_tokens, value_head_dim]` per layer.
        behind: The chunks that stood between the prefix and this one, if any did.
    """

    input_ids: torch.Tensor
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    behind: Behind = ALONE

    @property
    def num_tokens(self) -> int:
        """Tokens in the chunk."""
        return int(self.input_ids.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the keys and values, as they are when unpacked: one, in a cache that is right."""
        return {tensor.dtype for tensor in (*self.keys, *self.values)}

    def is_of(self, dtype: str) -> bool:
        """Whether all keys and values are of this dtype (`CacheIdentity.dtype`)."""
        return {str(found) for found in self.dtypes} == {f"torch.{dtype}"}

    def source(self, layer: int) -> ops.RowSource:
        """Return one layer as `ops.rope_gather` takes it, packed if it is held packed."""
        return ops.RowSource(self.keys[layer], self.values[layer])

    def ahead(self, device: torch.device) -> ChunkCache:
        """Return the cache with what all layers need in one copy on the device already; layers go one by one."""
        return self

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ChunkCache:
        """Return the cache with every tensor that it holds replaced by what `function` makes of it."""
        keys, values = (tuple(map(function, part)) for part in (self.keys, self.values))
        return ChunkCache(function(self.input_ids), keys, values, self.behind)

    def owned(self) -> ChunkCache:
        """Return the cache in contiguous CPU tensors that own their memory, copied where they do not yet.

        `chunks.encode` cuts chunks out of whole batches; keeping such a view would keep the whole padded batch alive.
        """
        return self.mapped(_owned)

    def has_ids(self, input_ids: Sequence[int] | None) -> bool:
        """Whether the cache is of exactly these tokens; `None` for any."""
        return input_ids is None or bool(self.input_ids.tolist() == list(input_ids))


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().to("cpu").contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@dataclass(frozen=True)
class CacheIdentity:
    """Everything that a chunk's K/V depend on besides its own tokens.

    Attributes:
        model: Hex fingerprint of weights and configuration (`model.model_fingerprint`).
        tokenizer: Hex fingerprint of the vocabulary, or "" without a tokenizer.
        prefix_ids: The encoding prefix.
        dtype: Dtype that the model computes in and the caches are stored in, for example `"float32"`.
        namespace: Caches of different namespaces are never found by each other's engines (`ProphetKVConfig.namespace`).
        encoding: What else chunks are encoded behind (`ProphetKVConfig.encoding`), or "" for nothing.
    """

    model: str
    tokenizer: str
    prefix_ids: tuple[int, ...]
    dtype: str
    namespace: str = ""
    encoding: str = ""

    @once
    def fingerprint(self) -> str:
        """64 hex digits; equal for two engines exactly if their chunk caches are interchangeable."""
        parts = [f"layout={LAYOUT_VERSION}", self.model, self.tokenizer, self.dtype, repr(self.prefix_ids)]
        if self.namespace:
            parts.append(f"namespace={self.namespace!r}")
        if self.encoding:
            parts.append(f"encoding={self.encoding}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def key(self, input_ids: Sequence[int]) -> str:
        """Cache key of the chunk with these token ids: 64 hex digits."""
        ids = torch.tensor(list(input_ids), dtype=torch.int32).numpy().tobytes()
        return hashlib.sha256(bytes.fromhex(self.fingerprint) + ids).hexdigest()
