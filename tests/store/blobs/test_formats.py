"""Formats of stored caches against an independent arithmetic, and what a blob of another format or version does."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, get_args

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.errors import BlobError
from prophetkv_rag.prompt.chunk_index import text_entry
from prophetkv_rag.store.blobs.blob import decode_blob, encode_blob, parse_blob_header
from prophetkv_rag.store.blobs.formats import BlobFormat
from prophetkv_rag.store.chunk_cache import ChunkCache
from prophetkv_rag.store.disk.store import DiskStore
from tests.store.caches import FINGERPRINT, assert_same, ids_of, key_of, make_cache
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

FORMATS = get_args(BlobFormat)
KEY = key_of(1, 70)


def round_trip(cache: ChunkCache, blob_format: Any) -> ChunkCache:
    key = key_of(1, cache.num_tokens)
    return decode_blob(
        encode_blob(cache, key=key, fingerprint=FINGERPRINT, blob_format=blob_format), key=key, fingerprint=FINGERPRINT
    )


def with_outliers(num_tokens: int = 70, dtype: torch.dtype = torch.float32) -> ChunkCache:
    """Keys with a few channels that are large everywhere, as real ones have; odd sizes, so that groups are cut."""
    cache = make_cache(1, num_tokens, head_dim=18)
    keys = []
    for tensor in cache.keys:
        scaled = tensor.clone()
        scaled[:, :, 3] = scaled[:, :, 3] * 2 + 50
        keys.append(scaled.to(dtype))
    return ChunkCache(cache.input_ids, tuple(keys), tuple(value.to(dtype) for value in cache.values))


def naive(lines: np.ndarray, levels: int, group: int) -> np.ndarray:
    """Largest error that rounding to `levels` steps between a group's least and greatest may make, per number."""
    allowed = np.empty_like(lines)
    for start in range(0, lines.shape[-1], group):
        part = lines[..., start : start + group]
        step = (part.max(-1, keepdims=True) - part.min(-1, keepdims=True)) / levels
        # Half a step, and what fp16 offsets and steps add.
        allowed[..., start : start + group] = 0.5 * step + levels * step / 1024 + np.abs(part).max() / 1024 + 2e-4
    return allowed


@pytest.mark.parametrize(("blob_format", "levels", "group"), [("int8", 255, 10**9), ("int4", 15, 32)])
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 70])
def test_integers_keep_to_half_a_step_of_their_own_scale(
    blob_format: BlobFormat, levels: int, group: int, num_tokens: int
) -> None:
    cache = with_outliers(num_tokens)
    found = round_trip(cache, blob_format)
    for layer in range(2):
        keys, values = cache.keys[layer].numpy(), cache.values[layer].numpy()
        error = np.abs(found.keys[layer].numpy() - keys).transpose(0, 2, 1)
        assert (error <= naive(keys.transpose(0, 2, 1), levels, group)).all(), "a channel's scale comes from its tokens"
        error = np.abs(found.values[layer].numpy() - values)
        assert (error <= naive(values, levels, group)).all(), "a token's scale comes from its channels"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blob_format", FORMATS)
def test_the_dtype_and_shapes_come_back_and_sizes_shrink(blob_format: BlobFormat, dtype: torch.dtype) -> None:
    cache = with_outliers(64, dtype)
    found = round_trip(cache, blob_format)
    for one, other in zip((*found.keys, *found.values), (*cache.keys, *cache.values), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.is_contiguous()
        error = (one.float() - other.float()).abs()
        tolerance = {"exact": 0, "fp32": 0, "bf16": 2**-8, "fp16": 2**-10, "int8": 0.02, "fp8": 2**-4, "int4": 0.12}
        assert (error <= tolerance[blob_format] * other.float().abs().amax()).all()
    if blob_format == "exact" or (blob_format == "fp32" and dtype == torch.float32):
        assert_same(found, cache)


def test_what_a_format_cannot_hold_is_stored_as_it_is() -> None:
    cache = make_cache(1, 8)
    cache.keys[0][0, 0, 0] = float("inf")
    cache.keys[1][0, 0, 0] = float("nan")
    cache.values[0][0, 0, 0] = 1e30
    for blob_format in FORMATS:
        found = round_trip(cache, blob_format)
        for tensor, wanted in (
            (found.keys[0], cache.keys[0]),
            (found.keys[1], cache.keys[1]),
            (found.values[0], cache.values[0]),
        ):
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("blob_format", FORMATS)
def test_every_flipped_bit_is_noticed_in_every_format(blob_format: BlobFormat) -> None:
    key = key_of(1)
    blob = encode_blob(
        make_cache(1), key=key, fingerprint=FINGERPRINT, blob_format=blob_format, entry=text_entry("a text of chunk 1")
    )
    header_end = 8 + int.from_bytes(blob[:8], "little")
    good = parse_blob_header(blob)
    for offset in range(len(blob)):
        flipped = bytearray(blob)
        flipped[offset] ^= 1 << (offset % 8)
        try:
            found = decode_blob(flipped, key=key, fingerprint=FINGERPRINT, input_ids=ids_of(1))
        except BlobError:
            continue
        # Only how the text is recognised has no checksum: it is used if the catalog is lost, and the text's own
        # sha256 then decides.
        assert offset < header_end
        assert parse_blob_header(flipped).entry != good.entry
        assert_same(found, round_trip(make_cache(1), blob_format))


def test_blobs_of_another_lossy_format_are_computed_again(tmp_path: Path) -> None:
    for written, opened, is_served in (("int8", "exact", False), ("exact", "int8", True), ("int4", "int8", False)):
        directory = tmp_path / f"{written}-{opened}"
        store = DiskStore(directory, 0, blob_format=written)  # type: ignore[arg-type]
        store.put(KEY, with_outliers(), fingerprint=FINGERPRINT)
        store.close()
        store = DiskStore(directory, 0, blob_format=opened)  # type: ignore[arg-type]
        found, was_corrupt = store.get(KEY, fingerprint=FINGERPRINT, input_ids=ids_of(1, 70))
        assert (found is not None, was_corrupt) == (is_served, False)
        store.put(KEY, with_outliers(), fingerprint=FINGERPRINT)
        assert store.get(KEY, fingerprint=FINGERPRINT, input_ids=ids_of(1, 70))[0] is not None
        store.close()


@pytest.mark.parametrize("blob_format", FORMATS)
def test_ram_and_disk_give_the_same_answer(tmp_path: Path, blob_format: BlobFormat) -> None:
    engine = ProphetKVEngine(
        tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(), store=DiskStore(tmp_path, blob_format=blob_format)
    )
    texts = [text_of(20, seed=seed) for seed in range(3)]
    engine.add_chunks(texts)
    prompt = "Read: " + " ".join(texts) + " So?"
    warm = engine.prefill(prompt)
    engine.store.close()
    again = ProphetKVEngine(
        engine.model, engine.tokenizer, config=ProphetKVConfig(), store=DiskStore(tmp_path, 0, blob_format=blob_format)
    )
    cold = again.prefill(prompt)
    assert [chunk.status for chunk in cold.report.chunks] == ["hit"] * 3
    assert cold.logits.equal(warm.logits)
    full = again.prefill(prompt, strategy="full_prefill").logits
    assert again.prefill(prompt, recompute_ratio=1.0).logits.sub(full).abs().max() < 1e-4, "ratio 1.0 needs no cache"
    again.store.close()


# ---- fuzz -----------------------------------------------------------------------------------------------------------

BLOBS = [
    (blob_format, encode_blob(make_cache(1), key=key_of(1), fingerprint=FINGERPRINT, blob_format=blob_format))
    for blob_format in FORMATS
]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[BlobFormat, bytes]:
    blob_format, blob = draw(st.sampled_from(BLOBS))
    data = bytearray(blob)
    kind = draw(st.sampled_from(["bytes", "cut", "splice", "header", "length", "noise"]))
    if kind == "bytes":
        for _ in range(draw(st.integers(1, 8))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    elif kind == "cut":
        start = draw(st.integers(0, len(data)))
        del data[start : start + draw(st.integers(1, len(data)))]
    elif kind == "splice":
        other = draw(st.sampled_from(BLOBS))[1]
        start, stop = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        data[start:stop] = other[start:stop]
    elif kind == "header":
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        name = draw(st.sampled_from(sorted(header)))
        numbers = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 2**31, 2**63])
        value = draw(
            st.recursive(st.none() | st.booleans() | numbers | st.floats() | st.text(), st.lists, max_leaves=4)
        )
        if isinstance(header[name], dict) and draw(st.booleans()):
            header[name][draw(st.sampled_from(sorted(header[name])))] = value
        else:
            header[name] = value
        text = json.dumps(header).encode()
        data[: 8 + size] = struct.pack("<Q", len(text)) + text
    elif kind == "length":
        data[:8] = struct.pack("<Q", draw(st.integers(0, 2**64 - 1)))
    else:
        data = bytearray(draw(st.binary(max_size=200)))
    return blob_format, bytes(data)


EXPECTED = {blob_format: round_trip(make_cache(1), blob_format) for blob_format in FORMATS}


def check_damaged(case: tuple[BlobFormat, bytes]) -> None:
    blob_format, data = case
    try:
        found = decode_blob(data, key=key_of(1), fingerprint=FINGERPRINT, input_ids=ids_of(1))
    except BlobError:
        return
    # Splicing two whole blobs may give a whole blob: then it is one of those.
    assert any(
        all(
            torch.equal(one, other)
            for one, other in zip((*found.keys, *found.values), (*wanted.keys, *wanted.values), strict=True)
        )
        for wanted in EXPECTED.values()
    ), blob_format


@hypothesis.settings(max_examples=600, deadline=None, derandomize=True, database=None)
@hypothesis.given(damaged())
def test_a_damaged_blob_never_crashes_and_never_gives_a_wrong_tensor(case: tuple[BlobFormat, bytes]) -> None:
    check_damaged(case)


def test_a_huge_claim_takes_no_memory(tmp_path: Path) -> None:
    """A sparse file of a terabyte whose header says so: refused before anything is allocated for it."""
    from prophetkv_rag.store.blobs.file import read_blob

    blob = BLOBS[0][1]
    path = tmp_path / "blob"
    path.write_bytes(blob)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(BlobError, match="bytes"):
        read_blob(path, key=key_of(1), fingerprint=FINGERPRINT, input_ids=ids_of(1))
    path.write_bytes(struct.pack("<Q", 1 << 39) + b"{")
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(BlobError, match="header says"):
        read_blob(path, key=key_of(1), fingerprint=FINGERPRINT, input_ids=ids_of(1))


def test_random_damage_in_numbers() -> None:
    from tests.store.blobs.fuzz_blobs import run

    assert run(2000, seed=3) == 2000
