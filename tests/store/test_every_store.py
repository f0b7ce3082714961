"""What every store does, in RAM and on disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prophetkv_rag.errors import InputError
from prophetkv_rag.prompt.chunk_index import text_entry
from prophetkv_rag.store.base import ChunkStore
from prophetkv_rag.store.chunk_cache import ChunkCache
from prophetkv_rag.store.disk.ram import RamTier
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.memory import MemoryStore
from prophetkv_rag.store.text_entry import TextEntry
from tests.store.caches import FINGERPRINT, assert_same, ids_of, key_of, make_cache

OTHER_FINGERPRINT = "0" * 64


@pytest.fixture(params=["memory", "disk", "disk without a RAM tier"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    opened: ChunkStore = MemoryStore()
    if request.param != "memory":
        opened = DiskStore(tmp_path / "store", ram_bytes=0 if "without" in request.param else 1 << 20)
    yield opened
    opened.close()


def entry_of(text: str) -> TextEntry:
    entry = text_entry(text)
    assert entry is not None
    return entry


def put(store: ChunkStore, *seeds: int) -> list[str]:
    for seed in seeds:
        store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)
    return [key_of(seed) for seed in seeds]


def get(store: ChunkStore, seed: int) -> tuple[ChunkCache | None, bool]:
    return store.get(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_put_is_got(store: ChunkStore, dtype: torch.dtype) -> None:
    cache = make_cache(1, dtype=dtype)
    assert key_of(1) not in store
    store.put(key_of(1), cache, fingerprint=FINGERPRINT)
    assert key_of(1) in store
    found, was_corrupt = get(store, 1)
    assert_same(found, cache)
    assert not was_corrupt
    assert get(store, 2) == (None, False)
    stats = store.stats()
    assert (stats.chunks, stats.tokens, stats.hits, stats.misses, stats.corrupt) == (1, 5, 1, 1, 0)
    assert stats.nbytes >= cache.nbytes


def test_a_kept_cache_does_not_keep_the_batch_it_was_cut_from(store: ChunkStore) -> None:
    rows, padded = torch.randn(10, 2, 5, 4), torch.randn(2, 2, 50, 4)
    keys, values = (rows[0], rows[1]), (padded[0][:, :5], padded[1][:, :5])  # contiguous views, and others
    store.put(key_of(1), ChunkCache(make_cache(1).input_ids, keys, values), fingerprint=FINGERPRINT)
    rows.zero_()
    padded.zero_()
    found, _ = get(store, 1)
    assert found is not None
    for tensor in (*found.keys, *found.values):
        assert tensor.abs().sum() > 0
        assert tensor.untyped_storage().nbytes() < min(rows.nbytes, padded.nbytes)


@pytest.mark.parametrize("change", [{"fingerprint": OTHER_FINGERPRINT}, {"input_ids": ids_of(2)}])
def test_another_models_or_texts_cache_is_never_returned(
    store: ChunkStore, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    put(store, 1)
    asked = {"fingerprint": FINGERPRINT, "input_ids": ids_of(1)} | change
    with caplog.at_level(logging.WARNING):
        assert store.get(key_of(1), **asked) == (None, True)  # type: ignore[arg-type]
    assert len(caplog.records) == 1
    assert store.stats().corrupt == 1
    assert key_of(1) not in store
    assert get(store, 1) == (None, False)


def test_entries_are_those_of_one_model_that_have_a_text(store: ChunkStore) -> None:
    one, two = entry_of("the first text of all"), entry_of("the second text, another one")
    store.put(key_of(1), make_cache(1), fingerprint=FINGERPRINT, entry=one)
    store.put(key_of(2), make_cache(2), fingerprint=OTHER_FINGERPRINT, entry=two)
    put(store, 3)
    assert dict(store.entries(FINGERPRINT)) == {key_of(1): one}
    assert dict(store.entries(OTHER_FINGERPRINT)) == {key_of(2): two}
    store.put(key_of(3), make_cache(3), fingerprint=FINGERPRINT, entry=two)  # known already; now its text is, too
    put(store, 1)  # and again without the text
    assert dict(store.entries(FINGERPRINT)) == {key_of(1): one, key_of(3): two}
    assert store.stats().chunks == 3


def test_a_cache_lives_as_long_as_somebody_refers_to_it(store: ChunkStore) -> None:
    shared, mine, free = put(store, 1, 2, 3)
    store.add_references("a", [shared, mine])
    store.add_references("a", [shared])
    store.add_references("b", [shared])
    assert sorted(store.references("a")) == sorted([shared, mine])
    assert store.drop_references("stranger", [shared, mine, free]) == []
    assert store.drop_references("a", [shared, mine, free]) == [mine]
    assert mine not in store
    assert get(store, 2) == (None, False)
    assert shared in store
    assert free in store  # nobody ever referred to it, so nobody's dropping deletes it
    assert store.drop_references("a", [shared]) == []
    assert store.drop_references("b", [shared]) == [shared]
    assert shared not in store
    assert store.references("b") == []


def test_a_cache_that_is_stored_only_if_somebody_refers_to_it(store: ChunkStore) -> None:
    for is_referenced in (False, True, False):
        store.put(key_of(1), make_cache(1), fingerprint=FINGERPRINT, if_referenced=True)
        assert (key_of(1) in store) == is_referenced
        assert (get(store, 1)[0] is not None) == is_referenced
        if is_referenced:
            assert store.drop_references("a", [key_of(1)]) == [key_of(1)]
        else:
            store.add_references("a", [key_of(1)])


def test_delete_takes_references_and_entries_along(store: ChunkStore) -> None:
    store.put(key_of(1), make_cache(1), fingerprint=FINGERPRINT, entry=entry_of("the first text of all"))
    store.add_references("a", [key_of(1)])
    store.delete([key_of(1), key_of(2)])
    assert key_of(1) not in store
    assert list(store.entries(FINGERPRINT)) == []
    put(store, 1)
    assert store.drop_references("a", [key_of(1)]) == []
    assert key_of(1) in store


def test_references_outlive_a_cache_that_was_corrupt_and_is_computed_again(store: ChunkStore) -> None:
    put(store, 1)
    store.add_references("a", [key_of(1)])
    store.get(key_of(1), fingerprint=OTHER_FINGERPRINT, input_ids=ids_of(1))
    put(store, 1)
    assert store.drop_references("a", [key_of(1)]) == [key_of(1)]
    assert key_of(1) not in store


@pytest.mark.parametrize("key", ["", "../" * 21 + "a", "/etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n", "é" * 64])
def test_a_key_is_64_hex_digits_and_nothing_else(store: ChunkStore, key: str) -> None:
    assert key not in store
    for call in (
        lambda: store.get(key, fingerprint=FINGERPRINT, input_ids=[1]),
        lambda: store.put(key, make_cache(1), fingerprint=FINGERPRINT),
        lambda: store.add_references("a", [key]),
    ):
        with pytest.raises(InputError, match="not a cache key"):
            call()


def test_threads_may_use_one_store(store: ChunkStore) -> None:
    errors: list[BaseException] = []

    def use(number: int) -> None:
        try:
            for seed in [*range(8), 100 + number]:  # eight chunks that all threads want, and one of its own
                cache, was_corrupt = get(store, seed)
                assert not was_corrupt
                if cache is None:
                    store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)
                store.add_references(f"thread {number}", [key_of(seed)])
                assert_same(get(store, seed)[0], make_cache(seed))
            assert store.drop_references(f"thread {number}", [key_of(100 + number)]) == [key_of(100 + number)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.stats().chunks == 8
    report = store.verify()
    assert (report.bad, report.missing, report.orphans) == ((), (), ())


def test_the_ram_tier_keeps_to_its_bytes_and_drops_the_least_recently_used() -> None:
    size = make_cache(1).nbytes
    tier = RamTier(3 * size)
    for seed in (1, 2, 3):
        tier.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)
    assert tier.get(key_of(1), fingerprint=FINGERPRINT, input_ids=ids_of(1)) is not None  # used again: 2 is the oldest
    tier.put(key_of(4), make_cache(4), fingerprint=FINGERPRINT)
    tier.put(key_of(4), make_cache(4), fingerprint=FINGERPRINT)
    held = [seed for seed in (1, 2, 3, 4) if tier.get(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed))]
    assert held == [1, 3, 4]
    assert tier.nbytes == 3 * size
    tier.put(key_of(5, 50), make_cache(5, 50), fingerprint=FINGERPRINT)  # larger than the whole tier
    assert tier.nbytes == 3 * size
    tier.drop([key_of(1), key_of(1)])
    assert tier.nbytes == 2 * size


def test_without_an_accelerator_pinning_is_given_up_quietly(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("pinned memory can be had here")
    tier = RamTier(1 << 20)
    tier.pins = True
    with caplog.at_level(logging.DEBUG):
        for seed in (1, 2):
            tier.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)
    assert len(caplog.records) == 1
    for seed in (1, 2):
        assert_same(tier.get(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed)), make_cache(seed))
    assert tier.nbytes == make_cache(1).nbytes + make_cache(2).nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_with_an_accelerator_caches_are_pinned() -> None:
    tier = RamTier(1 << 20)
    tier.pins = True
    tier.put(key_of(1), make_cache(1), fingerprint=FINGERPRINT)
    found = tier.get(key_of(1), fingerprint=FINGERPRINT, input_ids=ids_of(1))
    assert_same(found, make_cache(1))
    assert found is not None
    assert all(tensor.is_pinned() for tensor in (*found.keys, *found.values))
