from __future__ import annotations

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store.blobs.blob import decode_blob, encode_blob
from prophetkv_rag.store.chunk_cache import ChunkCache
from tests.store.caches import FINGERPRINT, assert_same, ids_of, key_of, make_cache

KEY, IDS, CACHE = key_of(1), ids_of(1), make_cache(1)
BLOB = encode_blob(CACHE, key=KEY, fingerprint=FINGERPRINT)
HEADER_END = 8 + int.from_bytes(BLOB[:8], "little")


def decode(data: bytes, **changes: object) -> ChunkCache:
    expected = {"key": KEY, "fingerprint": FINGERPRINT, "input_ids": IDS} | changes
    return decode_blob(data, **expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8],
    ids=str,
)
def test_round_trip_is_bit_for_bit(dtype: torch.dtype) -> None:
    cache = make_cache(1, dtype=dtype)
    assert_same(decode(encode_blob(cache, key=KEY, fingerprint=FINGERPRINT)), cache)


def test_it_is_a_plain_safetensors_file() -> None:
    tensors = safetensors.torch.load(BLOB)
    assert sorted(tensors) == ["input_ids", "keys.0", "keys.1", "values.0", "values.1"]
    assert tensors["values.1"].equal(CACHE.values[1])
    metadata = json.loads(BLOB[8:HEADER_END])["__metadata__"]
    assert metadata["key"] == KEY
    assert metadata["fingerprint"] == FINGERPRINT
    assert all(isinstance(value, str) for value in metadata.values())


def test_views_of_a_batch_are_written_like_tensors_of_their_own() -> None:
    batch = torch.randn(2, 3, 2, 2, 9, 4)  # layers, rows, keys or values, heads, tokens, dims
    cut = tuple(batch[layer, 1, 0, :, 2:7] for layer in range(2))
    cache = ChunkCache(CACHE.input_ids, cut, tuple(batch[layer, 1, 1, :, 2:7] for layer in range(2)))
    assert_same(decode(encode_blob(cache, key=KEY, fingerprint=FINGERPRINT)), cache)


def test_decoding_a_writable_buffer_copies_nothing_and_a_read_only_one_is_left_alone() -> None:
    buffer = bytearray(BLOB)
    cache = decode(buffer)  # type: ignore[arg-type]
    buffer[:] = bytes(len(buffer))
    assert not any(tensor.any() for tensor in (cache.input_ids, *cache.keys, *cache.values))
    decode(BLOB).values[1].zero_()
    assert_same(decode(BLOB), CACHE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key": key_of(2)}, "key"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"input_ids": ids_of(2)}, "token ids"),
        ({"input_ids": IDS[:-1]}, "token ids"),
        ({"input_ids": [*IDS, 7]}, "token ids"),
    ],
)
def test_what_is_not_exactly_what_was_asked_for_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(BlobError, match=reason):
        decode(BLOB, **changes)


def test_token_ids_are_checked_only_where_they_are_known() -> None:
    assert_same(decode(BLOB, input_ids=None), CACHE)


def test_truncated_at_any_length_is_refused() -> None:
    for length in range(len(BLOB)):
        with pytest.raises(BlobError):
            decode(BLOB[:length])


@pytest.mark.parametrize("tail", [b"\0", b"more"])
def test_bytes_behind_the_end_are_refused(tail: bytes) -> None:
    with pytest.raises(BlobError):
        decode(BLOB + tail)


def test_every_flipped_bit_is_noticed() -> None:
    for offset in range(len(BLOB)):
        for bit in range(8) if offset < HEADER_END else (offset % 8,):
            flipped = bytearray(BLOB)
            flipped[offset] ^= 1 << bit
            with pytest.raises(BlobError):
                decode(flipped)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\xff" * 64,
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
    ids=["nothing", "no metadata", "a list", "all ones", "deeply nested"],
)
def test_what_is_no_blob_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(BlobError):
        decode(data)


@pytest.mark.parametrize(
    "cache",
    [
        replace(CACHE, keys=(CACHE.keys[0], CACHE.keys[1][:, :-1])),
        replace(CACHE, values=(CACHE.values[0], CACHE.values[1][:1])),
        replace(CACHE, keys=(CACHE.keys[0], CACHE.keys[1][0])),
        replace(CACHE, keys=(), values=()),
        replace(CACHE, input_ids=CACHE.input_ids.long()),
    ],
    ids=["tokens", "heads", "dims", "no layers", "ids of another dtype"],
)
def test_shapes_that_do_not_fit_are_refused_even_with_right_checksums(cache: ChunkCache) -> None:
    try:
        data = encode_blob(cache, key=KEY, fingerprint=FINGERPRINT)
    except KeyError:  # a dtype that no blob has
        return
    with pytest.raises(BlobError):
        decode(data)


@pytest.mark.parametrize(("name", "value"), [("layout_version", "999"), ("format", "pt"), ("num_layers", "1")])
def test_another_layout_is_refused(name: str, value: str) -> None:
    metadata = json.loads(BLOB[8:HEADER_END])["__metadata__"] | {name: value}
    with pytest.raises(BlobError, match=name):
        decode(safetensors.torch.save(safetensors.torch.load(BLOB), metadata))
