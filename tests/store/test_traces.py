"""Caches that were encoded behind other chunks: kept no longer than those, replaced where they stand elsewhere now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store.base import ChunkStore
from prophetkv_rag.store.blobs.blob import decode_blob, encode_blob
from prophetkv_rag.store.blobs.formats import BlobFormat
from prophetkv_rag.store.chunk_cache import ALONE, Behind, ChunkCache
from prophetkv_rag.store.disk.opening import open_disk_store
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.transfer import export_caches, import_caches
from prophetkv_rag.store.disk.upkeep import clear, gc, verify
from prophetkv_rag.store.memory import MemoryStore
from tests.store.caches import FINGERPRINT, ids_of, key_of, make_cache

REMOTE = "remote"


@pytest.fixture(params=["memory", "disk", "disk without a RAM tier", "encrypted", "packed", REMOTE])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    opened: ChunkStore
    if request.param == "memory":
        opened = MemoryStore()
    elif request.param == REMOTE:
        opened = open_disk_store(tmp_path / "store", remote=f"file://{tmp_path}/remote", remote_timeout_s=30.0)
    else:
        opened = DiskStore(
            tmp_path / "store",
            ram_bytes=0 if "without" in request.param else 1 << 20,
            encryption_key=bytes(range(32)) if request.param == "encrypted" else None,
            blob_format="int8" if request.param == "packed" else "exact",
        )
        opened.files.keeps_packed = request.param == "packed"
    yield opened
    opened.close()


def behind(*seeds: int, through: tuple[int, ...] = (), chained: bool = False) -> Behind:
    return Behind(tuple(map(key_of, seeds)), tuple(map(key_of, through)), chained)


def put(store: ChunkStore, seed: int, stands: Behind = ALONE, *, rows_of: int | None = None) -> None:
    cache = make_cache(seed if rows_of is None else rows_of)
    cache = replace(cache, input_ids=make_cache(seed).input_ids, behind=stands)
    store.put(key_of(seed), cache, fingerprint=FINGERPRINT)
    store.add_references("engine", [key_of(seed)])


def found(store: ChunkStore, seed: int) -> ChunkCache | None:
    return store.find(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed)).cache


def held(store: ChunkStore, *seeds: int) -> list[int]:
    store.flush()
    return [seed for seed in seeds if found(store, seed) is not None]


def in_remote(tmp_path: Path, *seeds: int) -> list[int]:
    names = {path.stem for path in (tmp_path / "remote").rglob("*.safetensors")}
    return [seed for seed in seeds if key_of(seed) in names]


def test_what_a_cache_stands_behind_comes_back_with_it(store: ChunkStore) -> None:
    put(store, 1)
    put(store, 2)
    put(store, 3, behind(2, through=(1,), chained=True))
    cache = found(store, 3)
    assert cache is not None
    assert cache.behind == behind(2, through=(1,), chained=True)
    assert store.behind(key_of(3)).keys == (key_of(2),)
    assert store.behind(key_of(1)) == store.behind(key_of(9)) == ALONE
    assert store.known([key_of(1), key_of(9)]) == {key_of(1)}


def test_a_cache_goes_with_the_neighbour_and_its_chunk_stays_known(store: ChunkStore, tmp_path: Path) -> None:
    for seed in (1, 2, 5):
        put(store, seed)
    put(store, 3, behind(1, 2))
    put(store, 4, behind(3))  # of 3 alone, without the traces in its stored cache
    put(store, 6, behind(5))
    store.flush()
    assert store.drop_references("engine", [key_of(2)]) == [key_of(2)]
    assert held(store, 1, 2, 3, 4, 5, 6) == [1, 4, 5, 6]
    assert store.knows(key_of(3))
    assert store.behind(key_of(3)) == ALONE
    assert key_of(3) in store.references("engine")
    if (tmp_path / "remote").exists():
        assert in_remote(tmp_path, 1, 2, 3, 4, 5, 6) == [1, 4, 5, 6]


def test_down_a_chain_all_go(store: ChunkStore) -> None:
    for seed in range(1, 6):
        put(store, seed, behind(*[seed - 1] * (seed > 1), through=tuple(range(1, seed - 1)), chained=True))
    store.delete([key_of(2)])
    assert held(store, 1, 2, 3, 4, 5) == [1]


def test_a_circle_of_neighbours_goes_once(store: ChunkStore) -> None:
    put(store, 1)
    put(store, 2)
    put(store, 1, behind(2))
    put(store, 2, behind(1))
    store.delete([key_of(1)])
    assert held(store, 1, 2) == []
    assert store.knows(key_of(2))
    assert not store.knows(key_of(1))


def test_a_trace_of_what_is_not_known_is_not_kept(store: ChunkStore) -> None:
    put(store, 1)
    put(store, 3, behind(1, 2))
    put(store, 4, behind(1, through=(2,), chained=True))
    assert held(store, 1, 3, 4) == [1]


def test_a_chunk_that_stands_elsewhere_now_replaces_and_another_does_not(store: ChunkStore, tmp_path: Path) -> None:
    put(store, 1)
    put(store, 2)
    put(store, 3)
    plain = found(store, 3)
    assert plain is not None
    blobs = {path: path.read_bytes() for path in tmp_path.rglob(f"{key_of(3)}.safetensors")}
    put(store, 3, rows_of=7)  # the same place: what is there stays
    store.flush()
    assert blobs == {path: path.read_bytes() for path in blobs}
    for stands in (behind(1), behind(1, 2), ALONE):
        put(store, 3, stands, rows_of=7)
        store.flush()
        now = found(store, 3)
        assert now is not None
        assert now.behind == stands
        assert not now.keys[0].equal(plain.keys[0])
    assert store.stats().chunks == 3
    assert store.verify().num_faults == 0
    if (tmp_path / "remote").exists():
        (path,) = (tmp_path / "remote").rglob(f"{key_of(3)}.safetensors")
        assert path.read_bytes() == store.files.path(key_of(3)).read_bytes()


def test_a_replaced_cache_counts_its_own_bytes_only(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    put(store, 1)
    put(store, 2)
    put(store, 2, behind(1))
    assert store.catalog.nbytes() == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    store.close()


@pytest.mark.parametrize("collect", ["gc", "clear"])
def test_what_is_collected_takes_its_traces_along(tmp_path: Path, collect: str) -> None:
    store = DiskStore(tmp_path)
    put(store, 1)
    put(store, 2)
    put(store, 3, behind(2))
    put(store, 4, behind(1))
    with store.catalog.transaction() as run:
        run.execute("DELETE FROM refs WHERE key = ?", (key_of(2),))
    if collect == "gc":
        assert gc(store, grace_s=-1).unreferenced == 1
        assert held(store, 1, 2, 3, 4) == [1, 4]
        assert store.knows(key_of(3))
    else:
        clear(store)
        assert not list(tmp_path.rglob("*.safetensors"))
    store.close()


@pytest.mark.parametrize("rebuilt", [False, True])
def test_an_export_says_it_too(tmp_path: Path, rebuilt: bool) -> None:
    store = DiskStore(tmp_path / "one")
    for seed in (1, 2):
        put(store, seed)
    put(store, 3, behind(2, 1))
    export_caches(store, tmp_path / "caches.tar")
    store.close()
    other = DiskStore(tmp_path / "other")
    assert import_caches(other, tmp_path / "caches.tar").added == 3
    if rebuilt:
        other.close()
        (tmp_path / "other" / "catalog.sqlite").unlink()
        other = DiskStore(tmp_path / "other")
    assert other.behind(key_of(3)).keys == (key_of(2), key_of(1))
    other.delete([key_of(1)])
    assert held(other, 1, 2, 3) == [2]
    other.close()


def test_an_evicted_cache_is_remembered_and_still_goes(tmp_path: Path) -> None:
    size = len(encode_blob(make_cache(1), key=key_of(1), fingerprint=FINGERPRINT)) + 200
    store = DiskStore(tmp_path, ram_bytes=0, max_bytes=2 * size)
    put(store, 1)
    put(store, 2, behind(1))
    store.files.remove([key_of(2)])
    store.catalog.mark_lost([key_of(2)])
    assert store.behind(key_of(2)).keys == (key_of(1),)
    store.delete([key_of(1)])
    assert store.behind(key_of(2)) == ALONE
    store.close()


def test_stale_caches_that_are_named_go_and_good_ones_stay(tmp_path: Path) -> None:
    """As another machine's blob may come with traces that are not known here."""
    store = DiskStore(tmp_path, ram_bytes=0)
    put(store, 1)
    put(store, 2, behind(1))
    put(store, 3)
    blob = encode_blob(replace(make_cache(3), behind=behind(8)), key=key_of(3), fingerprint=FINGERPRINT)
    store.files.path(key_of(3)).write_bytes(blob)
    store.drop_caches([key_of(2), key_of(3)])
    assert held(store, 1, 2, 3) == [1, 2]
    assert verify(store).num_faults == 0
    store.close()


@pytest.mark.parametrize("blob_format", ["exact", "int8"])
def test_a_blob_that_says_it_in_an_unknown_way_is_bad(blob_format: BlobFormat) -> None:
    cache = replace(make_cache(1), behind=behind(2))
    blob = encode_blob(cache, key=key_of(1), fingerprint=FINGERPRINT, blob_format=blob_format)
    assert decode_blob(blob, key=key_of(1), fingerprint=FINGERPRINT).behind == behind(2)
    for wrong in ("", "[]", '[["x"], [], false]', "[[], [], 1]", "null", json.dumps([[key_of(2)], [], "yes"])):
        with pytest.raises(BlobError, match="which chunks it was encoded behind"):
            decode_blob(_with_behind(blob, wrong), key=key_of(1), fingerprint=FINGERPRINT)


def _with_behind(blob: bytes, value: str) -> bytes:
    length = int.from_bytes(blob[:8], "little")
    metadata = json.loads(blob[8 : 8 + length])["__metadata__"] | {"behind": value}
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(blob).items()}
    return bytes(safetensors.torch.save(tensors, metadata))


def test_it_takes_no_tensor_bytes() -> None:
    plain, traced = (
        encode_blob(replace(make_cache(1), behind=stands), key=key_of(1), fingerprint=FINGERPRINT)
        for stands in (ALONE, behind(2, 3))
    )
    assert 0 < len(traced) - len(plain) < 256
    assert torch.equal(safetensors.torch.load(plain)["keys.0"], safetensors.torch.load(traced)["keys.0"])
