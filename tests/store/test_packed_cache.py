"""Caches that stay as their blobs store them: the same numbers as unpacked ones, in fewer bytes, on every way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.kernels import ops
from prophetkv_rag.store.blobs.blob import decode_blob, encode_blob
from prophetkv_rag.store.chunk_cache import ChunkCache
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.packed_cache import PackedCache, PackedRows
from tests.store.caches import FINGERPRINT, assert_same, ids_of, key_of, make_cache
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

TOKENS = 70
KEY = key_of(1, TOKENS)
LAYERS, HEADS, DIM, VALUE_DIM = 2, 2, 16, 24
BYTES = LAYERS * HEADS * TOKENS * (DIM + VALUE_DIM)
SCALES = 2 * LAYERS * HEADS * (DIM + TOKENS)  # fp16: one for each channel of keys, and for each token of values
STORED = {"int8": BYTES + 2 * SCALES, "fp8": BYTES + SCALES, "fp16": 2 * BYTES, "bf16": 2 * BYTES}


def both(blob_format: str, dtype: torch.dtype = torch.float32) -> tuple[ChunkCache, ChunkCache]:
    """One blob, unpacked and as it is."""
    cache = make_cache(1, TOKENS, dtype=dtype, head_dim=DIM)
    blob = encode_blob(cache, key=KEY, fingerprint=FINGERPRINT, blob_format=blob_format)  # type: ignore[arg-type]
    unpacked, packed = (decode_blob(blob, key=KEY, fingerprint=FINGERPRINT, packed=packed) for packed in (False, True))
    return unpacked, packed


def refuse_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PackedRows) -> torch.Tensor:
        raise AssertionError("unpacked on the way")

    monkeypatch.setattr(PackedRows, "unpack", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blob_format", STORED)
def test_they_hold_the_same_numbers_in_the_bytes_of_the_blob(blob_format: str, dtype: torch.dtype) -> None:
    unpacked, packed = both(blob_format, dtype)
    assert type(unpacked) is ChunkCache
    assert_same(packed, unpacked)
    assert packed.num_tokens == TOKENS
    if STORED[blob_format] >= unpacked.nbytes:  # 16 bits for 16 bits
        assert type(packed) is ChunkCache
    else:
        assert type(packed) is PackedCache
        assert packed.nbytes == STORED[blob_format]
    assert_same(packed.mapped(torch.clone), unpacked)
    assert_same(packed.ahead(torch.device("cpu")), unpacked)


@pytest.mark.parametrize("blob_format", ["exact", "int4", "fp32"])
def test_what_kernels_cannot_read_or_is_not_smaller_comes_unpacked(blob_format: str) -> None:
    unpacked, packed = both(blob_format, torch.bfloat16)
    assert type(packed) is ChunkCache
    assert_same(packed, unpacked)


def test_a_layer_that_the_format_cannot_hold_stays_exact_among_packed_ones() -> None:
    cache = make_cache(1, TOKENS, head_dim=DIM)
    cache.keys[1][0, 0, 0] = 1e30
    blob = encode_blob(cache, key=KEY, fingerprint=FINGERPRINT, blob_format="int8")
    packed = decode_blob(blob, key=KEY, fingerprint=FINGERPRINT, packed=True)
    assert type(packed) is PackedCache
    assert_same(packed, decode_blob(blob, key=KEY, fingerprint=FINGERPRINT))
    source = packed.source(1)
    assert source.keys.equal(cache.keys[1])
    assert source.key_scale is source.key_low is None
    assert source.values.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blob_format", STORED)
def test_gathered_they_are_what_is_gathered_unpacked(
    blob_format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked, packed = both(blob_format, dtype)
    refuse_unpacking(monkeypatch)
    angles = torch.linspace(0, 6, TOKENS * DIM // 2).view(TOKENS, DIM // 2)
    found = []
    for cache in (unpacked, packed):
        keys = torch.zeros(HEADS, TOKENS + 9, DIM, dtype=dtype)
        values = torch.zeros(HEADS, TOKENS + 9, VALUE_DIM, dtype=dtype)
        ops.rope_gather(keys, values, [cache.source(1)], [4], angles.cos(), angles.sin())
        found.append((keys, values))
    (keys, values), (packed_keys, packed_values) = found
    assert packed_values.equal(values)
    if dtype == torch.float32:
        assert packed_keys.equal(keys)
    else:  # unpacked keys were rounded before they were rotated, packed ones are rounded once
        size = keys.float().abs().amax()
        assert (packed_keys.float() - keys.float()).abs().amax() <= torch.finfo(dtype).eps * size


def test_a_store_for_a_gpu_keeps_them_on_disk_and_in_ram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unpacking(monkeypatch)
    cache = make_cache(1, TOKENS, head_dim=DIM)
    for ram_bytes in (0, 1 << 20):
        store = DiskStore(tmp_path / str(ram_bytes), ram_bytes, blob_format="int8")
        store.pin_memory()
        store.put(KEY, cache, fingerprint=FINGERPRINT)
        assert store.stats().ram_nbytes == (STORED["int8"] if ram_bytes else 0)
        for _ in range(2):
            found, _ = store.get(KEY, fingerprint=FINGERPRINT, input_ids=ids_of(1, TOKENS))
            assert type(found) is PackedCache
        store.read_ahead([KEY], fingerprint=FINGERPRINT)
        store.flush()
        assert store.stats().ram_nbytes == (STORED["int8"] if ram_bytes else 0)
        store.close()


def test_a_packed_cache_can_be_stored_again(tmp_path: Path) -> None:
    unpacked, packed = both("int8")
    for name, cache in (("unpacked", unpacked), ("packed", packed)):
        store = DiskStore(tmp_path / name, 0)
        store.put(KEY, cache, fingerprint=FINGERPRINT)
        assert_same(store.get(KEY, fingerprint=FINGERPRINT, input_ids=ids_of(1, TOKENS))[0], unpacked)
        store.close()


@pytest.mark.parametrize("blob_format", ["int8", "fp8", "fp16"])
def test_an_engine_answers_from_packed_caches_as_from_unpacked_ones(
    tmp_path: Path, blob_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    texts = [text_of(20, seed=seed) for seed in range(3)]
    prompt = "Read: " + " ".join(texts) + " So?"
    logits = []
    for is_packed in (False, True):
        store = DiskStore(tmp_path, 0, blob_format=blob_format)  # type: ignore[arg-type]
        engine = ProphetKVEngine(model, tokenizer, config=ProphetKVConfig(), store=store)
        engine.add_chunks(texts)
        if is_packed:
            store.pin_memory()  # as for a model on a GPU
            refuse_unpacking(monkeypatch)
        logits.append(engine.prefill(prompt, recompute_ratio=0.3).logits)
        store.close()
    assert logits[0].equal(logits[1])
