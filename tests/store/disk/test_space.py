"""The byte limit of the disk tier: kept at every moment, by evicting what is worth least, and never what is in use."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.prompt.chunk_index import text_entry
from prophetkv_rag.store.blobs.blob import encode_blob
from prophetkv_rag.store.catalog import file as catalog_file_module
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.files import write_file
from tests.store.caches import FINGERPRINT, assert_same, ids_of, key_of, make_cache
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

SIZE = len(encode_blob(make_cache(1), key=key_of(1), fingerprint=FINGERPRINT, entry=text_entry("the text of chunk 1")))
ROOM = SIZE + 64  # entries differ in length by some digits
MODEL = tiny_llama()


def on_disk(directory: Path) -> int:
    """Bytes of blobs and of whatever is on the way to be one."""
    paths = [path for name in ("blobs", "incoming") for path in (directory / name).rglob("*")]
    return sum(path.stat().st_size for path in paths if path.is_file())


@pytest.fixture(autouse=True)
def _limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks at the directory just before every write, with the new blob's bytes added, and just after it."""
    broken: list[str] = []

    def watched(path: Path, data: bytes, **options: Any) -> None:
        limit = LIMITS.get(str(path.parents[2]))
        if limit is not None and on_disk(path.parents[2]) + len(data) > limit:
            broken.append(f"{path.name}: {on_disk(path.parents[2])} + {len(data)} > {limit}")
        write_file(path, data, **options)

    monkeypatch.setattr("prophetkv_rag.store.blobs.files.write_file", watched)
    yield
    LIMITS.clear()
    assert broken == []


LIMITS: dict[str, int] = {}


def open_store(directory: Path, blobs: int | None, **settings: Any) -> DiskStore:
    store = DiskStore(directory, 0, max_bytes=None if blobs is None else blobs * ROOM, **settings)
    if blobs is not None:
        LIMITS[str(directory)] = blobs * ROOM
    return store


def put(store: DiskStore, *seeds: int, is_used: bool = False) -> None:
    for seed in seeds:
        entry = text_entry(f"the text of chunk {seed}")
        if is_used:
            store.add_references("a", [key_of(seed)])
            store.put_soon(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)
            store.flush()
        else:
            store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT, entry=entry)


def use(store: DiskStore, *seeds: int) -> None:
    for seed in seeds:
        if store.get(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed))[0] is None:
            put(store, seed, is_used=True)


def held(store: DiskStore, seeds: range) -> list[int]:
    return [seed for seed in seeds if key_of(seed) in store]


def test_what_is_used_stays_and_what_nobody_asked_for_goes(tmp_path: Path) -> None:
    store = open_store(tmp_path, 4)
    put(store, 1, 2, 3, 4, 5, 6)
    assert held(store, range(9)) == [1, 2, 3, 4], "what comes later and is as unused does not displace anything"
    assert not store.accepts_new()
    use(store, 5, 5, 5, 2)
    assert held(store, range(9)) == [2, 3, 4, 5]
    use(store, 6)
    assert held(store, range(9)) == [2, 4, 5, 6]
    assert {key for key, _ in store.entries(FINGERPRINT)} == {key_of(seed) for seed in range(1, 7)}
    store.close()


def test_one_use_does_not_displace_what_is_used_more_but_several_do(tmp_path: Path) -> None:
    store = open_store(tmp_path, 2)
    put(store, 1, 2)
    use(store, *[1, 2] * 5)
    use(store, 3)
    assert held(store, range(9)) == [1, 2]
    use(store, *[3] * 6)
    assert 3 in held(store, range(9))
    store.close()


def test_plain_lru_takes_the_newest(tmp_path: Path) -> None:
    store = open_store(tmp_path, 2, eviction="lru")
    put(store, 1, 2)
    use(store, *[1, 2] * 5, 1)
    put(store, 3)
    assert held(store, range(9)) == [1, 3]
    store.close()
    again = open_store(tmp_path, 2, eviction="value")  # ranked anew: 3 has never been used
    use(again, 4)
    assert held(again, range(9)) == [1, 4]
    again.close()


def test_what_costs_more_to_compute_per_byte_stays(tmp_path: Path) -> None:
    store = open_store(tmp_path, 2)
    other = "f" * 64
    store.describe(FINGERPRINT, model="small", namespace="", seconds_per_token=0.001)
    store.describe(other, model="large", namespace="", seconds_per_token=0.1)
    store.put(key_of(1), make_cache(1), fingerprint=other, entry=text_entry("the text of chunk 1"))
    put(store, 2)
    for seed, fingerprint in ((1, other), (2, FINGERPRINT)):  # used alike, the cheap one last
        assert store.get(key_of(seed), fingerprint=fingerprint, input_ids=ids_of(seed))[0] is not None
    use(store, 3)
    assert held(store, range(9)) == [1, 3]
    store.close()


@pytest.mark.parametrize("eviction", ["value", "lru"])
def test_a_clock_that_jumps_about_changes_nothing_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eviction: Any
) -> None:
    kept = []
    for name, hours in (("steady", 0), ("jumping", 30)):
        real, generator = time.time, random.Random(3)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: real() + generator.uniform(-hours, hours) * 3600)  # noqa: B023
            store = open_store(tmp_path / name, 4, eviction=eviction)
            for number in range(60):
                use(store, (number * 5) % 7, (number * number) % 11)
                if number == 30:
                    store.close()
                    store = open_store(tmp_path / name, 4, eviction=eviction)
                with store.lease([key_of(1)]):
                    assert store.leases.held() == {key_of(1)}
            with store.catalog.transaction() as run:
                kept.append(run.execute("SELECT key, nbytes > 0, uses, rank FROM chunks ORDER BY id").fetchall())
            store.close()
    assert kept[0] == kept[1]


def test_history_survives_eviction_and_reopening(tmp_path: Path) -> None:
    store = open_store(tmp_path, 1)
    put(store, 1)
    use(store, *[1] * 3)
    use(store, *[2] * 9)
    assert held(store, range(9)) == [2]
    store.close()
    store = open_store(tmp_path, 1)
    use(store, *[1] * 8)
    assert held(store, range(9)) == [1], "its three earlier uses count"
    store.close()


def test_a_cache_larger_than_the_limit_is_only_known(tmp_path: Path) -> None:
    store = open_store(tmp_path, 0)
    put(store, 1)
    use(store, 1, 1)
    assert held(store, range(9)) == []
    assert store.knows(key_of(1))
    assert on_disk(tmp_path) == 0
    store.close()


def test_many_threads_and_stores_keep_to_the_limit(tmp_path: Path) -> None:
    stores = [open_store(tmp_path, 5) for _ in range(3)]
    errors: list[BaseException] = []
    over: list[int] = []
    is_done = threading.Event()

    def work(store: DiskStore, first: int) -> None:
        try:
            for turn in range(40):
                use(store, (first + turn * 7) % 20)
        except BaseException as error:
            errors.append(error)

    def watch() -> None:
        while not is_done.wait(0.002):
            try:
                if on_disk(tmp_path) > 5 * ROOM:
                    over.append(on_disk(tmp_path))
            except FileNotFoundError:
                continue

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=work, args=(store, number)) for number, store in enumerate(stores)]
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    is_done.set()
    watcher.join()
    assert (errors, over) == ([], [])
    report = stores[0].verify()
    assert (report.bad, report.missing, report.orphans) == ((), (), ())
    assert stores[0].stats().nbytes == on_disk(tmp_path)
    for store in stores:
        store.close()


LEASER = """
import sys
from prophetkv_rag.store.disk.leases import Leases
from pathlib import Path
with Leases(Path(sys.argv[1])).hold(sys.argv[2:]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_what_is_leased_is_neither_evicted_nor_collected(tmp_path: Path) -> None:
    from prophetkv_rag.store.disk.upkeep import gc

    store = open_store(tmp_path, 2)
    put(store, 1, 2)
    command = [sys.executable, "-c", LEASER, str(tmp_path / "leases"), key_of(1)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with store.lease([key_of(2)]):
        use(store, 3, 3)
        assert gc(store, grace_s=-1).unreferenced == 0, "nobody refers to 1 and 2, but they are in use"
        assert held(store, range(9)) == [1, 2]
    process.kill()  # a lease dies with its process
    process.wait()
    use(store, 3, 3)
    assert len(held(store, range(9))) == 2
    assert 3 in held(store, range(9))
    assert store.leases.held() == set()
    store.close()


def test_a_query_never_waits_for_another_process_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_file_module, "BUSY_TIMEOUT_S", 10_000.0)  # SQLite's patience, for whoever waits for it
    store = open_store(tmp_path, 3)
    put(store, 1)
    blocker = sqlite3.connect(tmp_path / "catalog.sqlite", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")  # as a long transaction elsewhere
    for _ in range(200):
        assert store.get(key_of(1), fingerprint=FINGERPRINT, input_ids=ids_of(1))[0] is not None
        list(store.new_entries(FINGERPRINT))
    store.put_soon(key_of(2), make_cache(2), fingerprint=FINGERPRINT)
    assert store.get(key_of(2), fingerprint=FINGERPRINT, input_ids=ids_of(2))[0] is not None, "it waits in memory"
    blocker.execute("ROLLBACK")
    blocker.close()
    store.close()


# ---- policies, on a real engine -------------------------------------------------------------------------------------

TEXTS = [text_of(24, seed=seed) for seed in range(6)]


def engine_on(store: DiskStore, **settings: Any) -> ProphetKVEngine:
    return ProphetKVEngine(MODEL, tiny_tokenizer(), config=ProphetKVConfig(**settings), store=store)


def statuses(engine: ProphetKVEngine, *texts: str) -> list[str]:
    result = engine.prefill("Read: " + " ".join(texts) + " So?")
    engine.store.flush()
    return [chunk.status for chunk in result.report.chunks]


def test_on_first_use_computes_nothing_until_a_prompt_has_the_chunk(tmp_path: Path) -> None:
    engine = engine_on(DiskStore(tmp_path, 0, policy="on_first_use"))
    computed: list[tuple[int, int]] = []
    engine.add_chunks(TEXTS, progress=lambda *counts: computed.append(counts))
    assert computed == []
    assert on_disk(tmp_path) == 0
    assert [statuses(engine, TEXTS[2]), statuses(engine, TEXTS[2], TEXTS[4])] == [["miss"], ["hit", "miss"]]
    assert engine.store.stats().chunks == 2
    engine.store.close()


def test_a_corpus_larger_than_the_disk_works_and_its_hot_part_is_reused(tmp_path: Path) -> None:
    whole = engine_on(DiskStore(tmp_path / "whole"))
    whole.add_chunks(TEXTS)
    limit = whole.store.stats().nbytes // 2
    store = DiskStore(tmp_path / "half", 0, max_bytes=limit)
    LIMITS[str(tmp_path / "half")] = limit
    engine = engine_on(store, index_batch_tokens=32)
    engine.add_chunks(TEXTS[:2])
    computed: list[tuple[int, int]] = []
    engine.add_chunks(TEXTS, progress=lambda *counts: computed.append(counts))
    assert len(computed) <= 1, "computing stops when the disk is full"
    for text in TEXTS:
        for _ in range(3):
            prompt = Prompt("Read: ", [text], " So?")
            found, wanted = engine.prefill(prompt), whole.prefill(prompt)
            store.flush()
            assert found.logits.sub(wanted.logits).abs().max() < 1e-4
    assert statuses(engine, TEXTS[5]) == ["hit"]
    assert on_disk(tmp_path / "half") <= limit
    engine.store.close()


def test_read_only_changes_nothing_and_works_in_a_read_only_directory(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    with pytest.raises(StoreError, match="no chunk caches"):
        DiskStore(directory, policy="read_only")
    engine = engine_on(DiskStore(directory))
    keys = engine.add_chunks(TEXTS[:2])
    engine.store.close()
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in (directory / "blobs").rglob("*")}
    reader = engine_on(DiskStore(directory, 0, policy="read_only"))
    assert statuses(reader, *TEXTS[:2]) == ["hit", "hit"]
    reader.add_chunks(TEXTS[2:3])
    assert statuses(reader, TEXTS[2]) == ["miss"]
    for call in (lambda: reader.remove_chunks(keys), lambda: reader.store.verify(repair=True)):
        with pytest.raises(InputError, match="read_only"):
            call()
    assert reader.store.verify().num_faults == 0
    reader.store.close()
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in (directory / "blobs").rglob("*")} == before


@pytest.mark.parametrize(
    "settings", [{"policy": "lazy"}, {"eviction": "fifo"}, {"blob_format": "int2"}, {"max_bytes": -1}]
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings)).replace("_", ".")):
        DiskStore(tmp_path, **settings)


def test_namespaces_share_nothing(tmp_path: Path) -> None:
    from prophetkv_rag.store.disk.upkeep import clear

    store = DiskStore(tmp_path)
    one, two, plain = (engine_on(store, namespace=name) for name in ("one", "two", ""))
    keys = {engine: engine.add_chunks([TEXTS[0]], owner=engine.config.namespace)[0] for engine in (one, two)}
    assert len(set(keys.values())) == 2
    assert [statuses(engine, TEXTS[0]) for engine in (one, two, plain)] == [["hit"], ["hit"], []]
    assert clear(store, "one") == 1
    assert list(store.entries(one.identity.fingerprint)) == []
    assert store.references("one") == []
    assert store.get(keys[one], fingerprint=one.identity.fingerprint, input_ids=[1]) == (None, False)
    assert statuses(two, TEXTS[0]) == ["hit"]
    names = [path.stem for path in (tmp_path / "blobs").rglob("*.safetensors")]
    assert names == [keys[two]]
    store.close()


# ---- catalogs of other versions -------------------------------------------------------------------------------------

SCHEMA_1 = """
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, fingerprint TEXT NOT NULL,
    anchor INTEGER, length INTEGER, digest TEXT, num_tokens INTEGER NOT NULL, nbytes INTEGER NOT NULL);
CREATE INDEX chunks_by_fingerprint ON chunks (fingerprint, id);
CREATE TABLE refs (owner TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (owner, key)) WITHOUT ROWID;
CREATE INDEX refs_by_key ON refs (key);
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
"""


def test_a_database_of_the_first_version_keeps_working(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "catalog.sqlite")
    connection.executescript(SCHEMA_1)
    entry = text_entry("the text of chunk 1")
    assert entry is not None
    data = encode_blob(make_cache(1), key=key_of(1), fingerprint=FINGERPRINT)  # as version 1 wrote it: no entry
    row = (key_of(1), FINGERPRINT, entry.anchor, entry.length, entry.digest, 5, len(data))
    with connection:
        connection.execute(
            "INSERT INTO chunks (key, fingerprint, anchor, length, digest, num_tokens, nbytes) VALUES (?,?,?,?,?,?,?)",
            row,
        )
        connection.execute("INSERT INTO refs VALUES ('a', ?)", (key_of(1),))
    connection.close()
    path = tmp_path / "blobs" / key_of(1)[:2] / f"{key_of(1)}.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    store = DiskStore(tmp_path, max_bytes=2 * ROOM)
    LIMITS[str(tmp_path)] = 2 * ROOM
    assert dict(store.entries(FINGERPRINT)) == {key_of(1): entry}
    assert store.references("a") == [key_of(1)]
    assert_same(store.get(key_of(1), fingerprint=FINGERPRINT, input_ids=ids_of(1))[0], make_cache(1))
    assert store.stats().nbytes == len(data) == on_disk(tmp_path)
    use(store, 2, 3, 3)
    assert on_disk(tmp_path) <= 2 * ROOM
    assert store.drop_references("a", [key_of(1)]) == [key_of(1)]
    assert not path.exists()
    store.close()


@pytest.mark.parametrize("damage", ["deleted", "nonsense", "truncated", "zeroed page"])
def test_a_catalog_that_is_gone_or_damaged_is_made_again_from_the_blobs(tmp_path: Path, damage: str) -> None:
    engine = engine_on(DiskStore(tmp_path))
    keys = engine.add_chunks(TEXTS, owner="a")
    wanted = engine.prefill("Read: " + " ".join(TEXTS) + " So?")
    engine.store.close()
    catalog = tmp_path / "catalog.sqlite"
    assert {path.name for path in tmp_path.iterdir()} == {"catalog.sqlite", "blobs", "incoming", "leases", "lock"}
    if damage == "deleted":
        catalog.unlink()
    elif damage == "nonsense":
        catalog.write_bytes(b"this is no database, but it is long enough to be looked at" * 20)
    elif damage == "truncated":
        os.truncate(catalog, catalog.stat().st_size // 3)
    else:
        data = bytearray(catalog.read_bytes())
        data[4096:8192] = bytes(4096)
        catalog.write_bytes(data)
    store = DiskStore(tmp_path)
    if damage == "zeroed page":
        assert store.verify(repair=True).num_faults >= 0
    engine = engine_on(store)
    found = engine.prefill("Read: " + " ".join(TEXTS) + " So?")
    assert [chunk.status for chunk in found.report.chunks] == ["hit"] * len(TEXTS)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    assert store.verify().num_faults == 0
    assert engine.remove_chunks(keys[:1], owner="a") == keys[:1], "delete really deletes, whoever it was that referred"
    assert keys[0] not in store
    store.close()
