"""Chunk caches of random numbers for the store's tests."""

from __future__ import annotations

import torch

from prophetkv_rag.store.base import ChunkStore
from prophetkv_rag.store.chunk_cache import CacheIdentity, ChunkCache

IDENTITY = CacheIdentity(model="m", tokenizer="t", prefix_ids=(1, 2), dtype="float32")
FINGERPRINT = IDENTITY.fingerprint


def ids_of(seed: int, num_tokens: int = 5) -> list[int]:
    return [seed * 1000 + i for i in range(num_tokens)]


def key_of(seed: int, num_tokens: int = 5) -> str:
    return IDENTITY.key(ids_of(seed, num_tokens))


def make_cache(
    seed: int, num_tokens: int = 5, *, dtype: torch.dtype = torch.float32, num_layers: int = 2, head_dim: int = 4
) -> ChunkCache:
    """Two KV heads; values are half as wide again as keys, so that nothing may take one for the other."""
    generator = torch.Generator().manual_seed(seed)

    def random(width: int) -> tuple[torch.Tensor, ...]:
        shape = (2, num_tokens, width)
        return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(num_layers))

    input_ids = torch.tensor(ids_of(seed, num_tokens), dtype=torch.int32)
    return ChunkCache(input_ids, random(head_dim), random(head_dim + head_dim // 2))


def assert_same(cache: ChunkCache | None, expected: ChunkCache) -> None:
    """Bit for bit, dtypes and shapes included."""
    assert cache is not None
    found = [cache.input_ids, *cache.keys, *cache.values]
    wanted = [expected.input_ids, *expected.keys, *expected.values]
    assert len(cache.keys) == len(expected.keys)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8))


def found_in(store: ChunkStore, *seeds: int) -> list[bool]:
    """Which of them a store can give; what it gives is compared."""
    hits = []
    for seed in seeds:
        cache, was_corrupt = store.get(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed))
        assert not was_corrupt
        if cache is not None:
            assert_same(cache, make_cache(seed))
        hits.append(cache is not None)
    return hits
