"""Chunks by their token ids, for whoever finds them so: read from blobs without their keys and values."""

from __future__ import annotations

import json

import torch

from prophetkv_rag.store import ChunkCache
from prophetkv_rag.store.disk import open_disk_store

FINGERPRINT = "ab" * 32


def cache_of(ids):
    rows = torch.randn(2, len(ids), 8)
    return ChunkCache(torch.tensor(ids, dtype=torch.int32), (rows,), (rows + 1,))


def key_of(number):
    return f"{number:064x}"


def test_what_any_store_on_the_directory_has_stored_since(tmp_path):
    with_key = {"encryption_key": b"0" * 32}
    for name, settings in (("plain", {}), ("int8", {"blob_format": "int8"}), ("sealed", with_key)):
        writer, reader = (open_disk_store(tmp_path / name, **settings) for _ in range(2))
        writer.put(key_of(1), cache_of([5, 6, 7]), fingerprint=FINGERPRINT)
        writer.put(key_of(2), cache_of([9]), fingerprint="cd" * 32)
        assert list(reader.new_chunks(FINGERPRINT)) == [(key_of(1), [5, 6, 7])]
        writer.put(key_of(3), cache_of(list(range(300))), fingerprint=FINGERPRINT)
        assert list(reader.new_chunks(FINGERPRINT)) == [(key_of(3), list(range(300)))]
        assert list(reader.new_chunks(FINGERPRINT)) == []
        for store in (writer, reader):
            store.close()


def test_what_is_damaged_or_gone_is_left_out(tmp_path):
    store = open_disk_store(tmp_path)
    for number in range(3):
        store.put(key_of(number), cache_of([number] * 20), fingerprint=FINGERPRINT)
    path = store.files.path(key_of(1))
    data = bytearray(path.read_bytes())
    body = 8 + int.from_bytes(data[:8], "little")
    data[body + json.loads(data[8:body])["input_ids"]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    store.files.path(key_of(2)).unlink()
    assert list(store.new_chunks(FINGERPRINT)) == [(key_of(0), [0] * 20)]


def test_what_was_absent_when_it_was_listed_is_listed_when_it_comes(tmp_path):
    """Known without a cache, or evicted: another process computes it later, and its row in the catalog stays."""
    store, other = (open_disk_store(tmp_path) for _ in range(2))
    for number in range(100):
        other.note(key_of(number), fingerprint=FINGERPRINT, num_tokens=20, entry=None)
    assert list(store.new_chunks(FINGERPRINT)) == []
    for number in (0, 99):
        other.put(key_of(number), cache_of([number] * 20), fingerprint=FINGERPRINT)
    found = [*store.new_chunks(FINGERPRINT), *store.new_chunks(FINGERPRINT)]
    assert found == [(key_of(0), [0] * 20), (key_of(99), [99] * 20)]
    assert list(store.new_chunks(FINGERPRINT)) == []
