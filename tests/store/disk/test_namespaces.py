"""Limits of namespaces: each makes room among its own caches, on disk and in RAM, and none among another's."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.store.blobs.blob import encode_blob
from prophetkv_rag.store.chunk_cache import CacheIdentity
from prophetkv_rag.store.disk.ram import RamTier
from prophetkv_rag.store.disk.store import DiskStore
from tests.store.caches import ids_of, make_cache
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

IDENTITIES = {
    (namespace, model): CacheIdentity(model, "t", (1, 2), "float32", namespace)
    for namespace in ("a", "b")
    for model in ("m", "n")
}
ONE = IDENTITIES["a", "m"]
SIZE = len(encode_blob(make_cache(1), key=ONE.key(ids_of(1)), fingerprint=ONE.fingerprint, namespace=ONE.namespace))


def opened(directory: Path, *, each: int | None, together: int | None = None, **settings: Any) -> DiskStore:
    """A store that keeps so many blobs of each namespace, and of all."""
    store = DiskStore(
        directory,
        settings.pop("ram_bytes", 0),
        max_bytes=None if together is None else together * SIZE,
        namespace_max_bytes=None if each is None else each * SIZE,
        **settings,
    )
    for identity in IDENTITIES.values():
        store.describe(identity.fingerprint, model=identity.model, namespace=identity.namespace, seconds_per_token=1.0)
    return store


def put(store: DiskStore, who: str, *seeds: int, model: str = "m", times: int = 0) -> None:
    identity = IDENTITIES[who, model]
    for seed in seeds:
        key = identity.key(ids_of(seed))
        store.add_references(who, [key])
        for _ in range(times):
            store.get(key, fingerprint=identity.fingerprint, input_ids=ids_of(seed))
        store.put(key, make_cache(seed), fingerprint=identity.fingerprint, if_referenced=times > 0)


def held(store: DiskStore, who: str, model: str = "m") -> list[int]:
    return [seed for seed in range(40) if IDENTITIES[who, model].key(ids_of(seed)) in store]


def charged(store: DiskStore) -> dict[str, int]:
    """What the catalog says each fingerprint takes, and what its files take: both must be the same."""
    with store.catalog.transaction(is_write=False) as run:
        said = dict(run.execute("SELECT fingerprint, nbytes FROM fingerprint_bytes WHERE nbytes"))
    found: dict[str, int] = {}
    for row in store.catalog.rows():
        if store.files.path(row.key).exists():
            found[row.fingerprint] = found.get(row.fingerprint, 0) + store.files.path(row.key).stat().st_size
    assert said == found
    return said


def test_what_one_namespace_writes_evicts_only_its_own(tmp_path: Path) -> None:
    store = opened(tmp_path, each=3, together=6)
    put(store, "a", 1, 2, 3)
    put(store, "b", *range(10, 30), times=9)  # used a lot: worth more than anything that "a" has
    assert held(store, "a") == [1, 2, 3]
    assert len(held(store, "b")) == 3
    put(store, "a", 4, times=9)
    assert len(held(store, "a")) == 3
    assert 4 in held(store, "a")
    assert max(charged(store).values()) <= 3 * SIZE
    store.close()


def test_without_a_limit_of_its_own_a_namespace_takes_what_another_has(tmp_path: Path) -> None:
    """The test above would see it."""
    store = opened(tmp_path, each=None, together=6)
    put(store, "a", 1, 2, 3)
    put(store, "b", *range(10, 30), times=9)
    assert held(store, "a") == []
    store.close()


def test_all_models_of_a_namespace_share_its_limit(tmp_path: Path) -> None:
    store = opened(tmp_path, each=3)
    put(store, "a", 1, 2)
    put(store, "a", 1, 2, model="n", times=3)  # the same tokens: other keys, other blobs
    assert len(held(store, "a")) + len(held(store, "a", "n")) == 3
    assert held(store, "a", "n") == [1, 2]
    assert store.catalog.nbytes() <= 3 * SIZE
    store.close()


def test_a_text_that_two_namespaces_have_is_two_blobs_and_each_pays_for_its_own(tmp_path: Path) -> None:
    store = opened(tmp_path, each=2)
    put(store, "a", 1)
    put(store, "b", 1)
    store.add_references("another collection of a", [ONE.key(ids_of(1))])
    assert sorted(charged(store)) == sorted(IDENTITIES[who, "m"].fingerprint for who in ("a", "b"))
    assert set(charged(store).values()) == {SIZE}, "two collections of a namespace share one blob, which counts once"
    store.close()


def test_where_the_disk_is_smaller_than_all_may_have_value_decides_between_them(tmp_path: Path) -> None:
    store = opened(tmp_path, each=3, together=4)
    put(store, "a", 1, 2, 3)
    put(store, "b", 10, 11, 12, times=5)
    assert held(store, "b") == [10, 11, 12]
    assert len(held(store, "a")) == 1
    store.close()


def test_a_chunk_that_cannot_have_room_evicts_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path, each=2, together=2)
    put(store, "a", 1, 2, times=9)
    put(store, "b", 10, times=1)  # within its own limit, and worth less than what is there
    assert (held(store, "a"), held(store, "b")) == ([1, 2], [])
    assert store.stats().evictions == 0
    store.close()


def test_indexing_stops_at_the_namespaces_limit_and_goes_on_for_others(tmp_path: Path) -> None:
    store = opened(tmp_path, each=2, together=10)
    put(store, "a", 1, 2, 3)
    assert held(store, "a") == [1, 2]
    assert not store.accepts_new(fingerprint=ONE.fingerprint)
    assert not store.accepts_new(fingerprint=IDENTITIES["a", "n"].fingerprint)
    assert store.accepts_new(fingerprint=IDENTITIES["b", "m"].fingerprint)
    assert store.accepts_new(1, fingerprint=IDENTITIES["b", "m"].fingerprint)
    assert not store.accepts_new(2, fingerprint=IDENTITIES["b", "m"].fingerprint)
    store.close()


def test_a_limit_that_is_given_later_is_kept_at_once(tmp_path: Path) -> None:
    store = opened(tmp_path, each=None)
    put(store, "a", *range(6))
    put(store, "b", 10, 11)
    store.close()
    store = opened(tmp_path, each=3)
    assert len(held(store, "a")) == 3
    assert held(store, "b") == [10, 11]
    assert store.stats().namespace_max_nbytes == 3 * SIZE
    store.close()


def test_what_no_engine_has_described_is_a_namespace_of_its_own(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 0, namespace_max_bytes=2 * SIZE)
    for identity in (ONE, IDENTITIES["b", "m"]):
        for seed in range(4):
            store.put(identity.key(ids_of(seed)), make_cache(seed), fingerprint=identity.fingerprint)
    assert (held(store, "a"), held(store, "b")) == ([0, 1], [0, 1])
    store.close()


def test_the_ram_tier_does_the_same() -> None:
    size = make_cache(1).nbytes
    tier = RamTier(4 * size, 2 * size)
    fingerprints = {key: identity.fingerprint for key, identity in IDENTITIES.items()}
    for (namespace, _), fingerprint in fingerprints.items():
        tier.name(fingerprint, namespace)
    tier.put("a1", make_cache(1), fingerprint=fingerprints["a", "m"])
    tier.put("a2", make_cache(2), fingerprint=fingerprints["a", "n"])
    for number in range(9):
        tier.put(f"b{number}", make_cache(number), fingerprint=fingerprints["b", "m"])
    assert tier.keys() == ["a1", "a2", "b7", "b8"]
    tier.put("a3", make_cache(3), fingerprint=fingerprints["a", "m"])
    assert tier.keys() == ["a2", "b7", "b8", "a3"]
    tier.drop(["b7", "b8"])
    tier.name(fingerprints["b", "m"], "a")  # described anew, as somebody else's
    assert tier.nbytes == 2 * size
    tier.put("b9", make_cache(9), fingerprint=fingerprints["b", "m"])
    assert tier.keys() == ["a3", "b9"]


def test_what_every_fingerprint_takes_is_counted_right_whatever_happens(tmp_path: Path) -> None:
    generator = random.Random(3)
    store = opened(tmp_path, each=3, together=7)
    for _ in range(150):
        who, model, seed = generator.choice("ab"), generator.choice("mn"), generator.randrange(8)
        key = IDENTITIES[who, model].key(ids_of(seed))
        step = generator.choice(["put", "put", "use", "delete", "lose", "reopen"])
        if step == "put":
            put(store, who, seed, model=model)
        elif step == "use":
            put(store, who, seed, model=model, times=2)
        elif step == "delete":
            store.drop_references(who, [key])
        elif step == "lose":
            store.files.remove([key])
            store.catalog.mark_lost([key])
        else:
            store.close()
            store = opened(tmp_path, each=3, together=7)
        sizes = charged(store)
        for namespace in "ab":
            own = (identity.fingerprint for (who, _), identity in IDENTITIES.items() if who == namespace)
            assert sum(sizes.get(fingerprint, 0) for fingerprint in own) <= 3 * SIZE
    store.close()


def test_a_catalog_of_the_version_before_learns_what_its_blobs_take(tmp_path: Path) -> None:
    store = opened(tmp_path, each=None)
    put(store, "a", 1, 2)
    put(store, "b", 10)
    before = charged(store)
    store.close()
    with sqlite3.connect(tmp_path / "catalog.sqlite") as catalog:
        for trigger in ("chunk_charged", "chunk_recharged", "chunk_gone", "chunk_uncoupled"):
            catalog.execute(f"DROP TRIGGER {trigger}")
        catalog.execute("DROP INDEX chunks_by_fingerprint_and_rank")
        catalog.execute("DROP TABLE fingerprint_bytes")
        catalog.execute("DROP TABLE behind")
        catalog.execute("DELETE FROM state WHERE name = 'deletes'")
        catalog.execute("PRAGMA user_version = 3")
    catalog.close()
    reader = DiskStore(tmp_path, policy="read_only", namespace_max_bytes=SIZE)
    reader.forget_deleted()
    assert reader.get(ONE.key(ids_of(1)), fingerprint=ONE.fingerprint, input_ids=ids_of(1))[0] is not None
    reader.close()
    store = opened(tmp_path, each=1)
    assert (len(held(store, "a")), held(store, "b")) == (1, [10])
    assert sum(before.values()) == 3 * SIZE
    assert sum(charged(store).values()) == 2 * SIZE
    store.close()


def test_one_tenant_s_load_leaves_the_other_s_hits_alone(tmp_path: Path) -> None:
    """On real engines, with a RAM tier: what was a hit for "a" is one after any number of questions by "b"."""
    model, texts = tiny_llama(), [text_of(20, seed=seed) for seed in range(8)]
    unbounded = DiskStore(tmp_path / "whole")
    engine = ProphetKVEngine(model, tiny_tokenizer(), store=unbounded)
    keys = engine.add_chunks(texts[:2])
    # Indexing stops where another blob like the last one would not fit.
    on_disk = 2 * max(unbounded.files.path(key).stat().st_size for key in keys) + 400
    in_ram = unbounded.stats().ram_nbytes
    unbounded.close()

    def tiers_of_a(directory: Path, limits: dict[str, int]) -> list[str]:
        store = DiskStore(directory, 2 * in_ram, max_bytes=2 * on_disk, **limits)
        tenants = [
            ProphetKVEngine(model, tiny_tokenizer(), config=ProphetKVConfig(namespace=name), store=store)
            for name in "ab"
        ]
        tenants[0].add_chunks(texts[:2])
        tenants[1].add_chunks(texts)
        for text in texts * 3:
            tenants[1].prefill("Read: " + text + " So?")
            store.flush()
        report = tenants[0].prefill("Read: " + " ".join(texts[:2]) + " So?").report
        store.close()
        return [chunk.tier for chunk in report.chunks]

    assert tiers_of_a(tmp_path / "apart", {"namespace_max_bytes": on_disk, "namespace_ram_bytes": in_ram}) == [
        "ram",
        "ram",
    ]
    assert set(tiers_of_a(tmp_path / "together", {})) != {"ram"}, "without limits of their own it can be told"


@pytest.mark.parametrize("name", ["namespace_max_bytes", "namespace_ram_bytes"])
def test_a_negative_limit_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is -1"):
        DiskStore(tmp_path, **{name: -1})
