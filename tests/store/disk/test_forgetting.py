"""Deleted means deleted: from the RAM of every process, from what the catalog's file still holds, and by namespace."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.prompt.chunk_index import text_entry
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.transfer import export_caches, import_caches
from prophetkv_rag.store.disk.upkeep import clear, gc, verify
from tests.store.caches import FINGERPRINT, ids_of, key_of, make_cache
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

TEXTS = [text_of(20, seed=seed) for seed in range(3)]
PROMPT = "Read: " + " ".join(TEXTS) + " So?"
MODEL = tiny_llama()


def put(store: DiskStore, *seeds: int) -> None:
    for seed in seeds:
        store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT, entry=text_entry(f"the text of {seed}"))
        store.add_references("a", [key_of(seed)])


def get(store: DiskStore, seed: int) -> bool:
    return store.get(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed))[0] is not None


def engine_on(store: DiskStore, namespace: str = "") -> ProphetKVEngine:
    return ProphetKVEngine(MODEL, tiny_tokenizer(), config=ProphetKVConfig(namespace=namespace), store=store)


DELETES: dict[str, Callable[[DiskStore], object]] = {
    "delete": lambda store: store.delete([key_of(1)]),
    "drop_references": lambda store: store.drop_references("a", [key_of(1)]),
    "clear": lambda store: clear(store),
    "gc": lambda store: gc(store, {}, grace_s=-1),
}


@pytest.mark.parametrize("how", DELETES)
@pytest.mark.parametrize("when", ["while it is read", "before it is committed"])
def test_what_is_deleted_while_a_query_reads_it_does_not_stay_in_ram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, when: str
) -> None:
    store = DiskStore(tmp_path)
    put(store, 1)
    store.drop_from_memory([key_of(1)])
    if when == "while it is read":
        read = store.files.read

        def read_late(*arguments: Any, **options: Any) -> Any:
            found = read(*arguments, **options)
            DELETES[how](store)
            return found

        monkeypatch.setattr(store.files, "read", read_late)
        assert get(store, 1), "it was there when it was asked for"
    else:
        remove, is_first = store.files.remove, [True]

        def query_meanwhile(keys: Any) -> None:
            if is_first.pop() if is_first else False:
                found: list[bool] = []
                query = threading.Thread(target=lambda: found.append(get(store, 1)))
                query.start()
                query.join()
                assert found == [True], "it does not see yet that the chunk is deleted"
            remove(keys)

        monkeypatch.setattr(store.files, "remove", query_meanwhile)
        DELETES[how](store)
    assert not store._ram.holds(key_of(1))
    store.close()


def test_what_another_process_deletes_leaves_this_one_s_ram(tmp_path: Path) -> None:
    server, other = DiskStore(tmp_path), DiskStore(tmp_path)
    engine = engine_on(server)
    keys = engine.add_chunks(TEXTS, owner="a")
    assert [chunk.tier for chunk in engine.prefill(PROMPT).report.chunks] == ["ram"] * 3
    other.drop_references("a", keys[:2])
    engine.prefill("Something else.")  # whatever it is asked next
    server.flush()
    assert server._ram.keys() == keys[2:]
    assert [chunk.tier for chunk in engine.prefill(PROMPT).report.chunks][2:] == ["ram"]
    server.flush()
    assert [key in server for key in keys] == [False, False, True], "nor does a question bring it back"
    clear(other)
    engine.prefill("Something else.")
    server.flush()
    assert server._ram.keys() == []
    for store in (server, other):
        store.close()


def digests(directory: Path) -> list[bytes]:
    """Which texts' hashes stand anywhere in the directory's files."""
    everything = b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())
    wanted = [hashlib.sha256(f"the text of {seed}".encode()).hexdigest().encode() for seed in range(1, 200)]
    return [digest for digest in wanted if digest in everything]


def test_clearing_leaves_no_hash_of_a_text_behind(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    put(store, *range(1, 200))
    store.close()
    (tmp_path / "catalog.sqlite").rename(tmp_path / "catalog.sqlite.damaged")  # as one that was made again leaves
    store = DiskStore(tmp_path)
    assert len(digests(tmp_path)) == 199
    assert clear(store) == 199
    assert digests(tmp_path) == []
    store.close()
    assert digests(tmp_path) == []


@pytest.mark.parametrize("how", ["the catalog is lost", "imported"])
def test_a_namespace_is_cleared_also_where_no_engine_has_named_it_here(tmp_path: Path, how: str) -> None:
    store = DiskStore(tmp_path / "one")
    for name in ("a", "b"):
        engine_on(store, name).add_chunks(TEXTS, owner=name)
    export_caches(store, tmp_path / "caches.tar")
    store.close()
    if how == "imported":
        store = DiskStore(tmp_path / "two")
        assert import_caches(store, tmp_path / "caches.tar").added == 6
    else:
        (tmp_path / "one" / "catalog.sqlite").unlink()
        store = DiskStore(tmp_path / "one")
    assert clear(store, "a") == 3
    assert store.stats().chunks == 3
    assert {chunk.tier for chunk in engine_on(store, "b").prefill(PROMPT).report.chunks} <= {"disk", "ram"}
    store.close()


# ---- what `cache export` and `cache import` could give away, or take in ---------------------------------------------


def test_an_export_is_private_from_its_first_byte_on(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    put(store, 1, 2)
    (tmp_path / "caches.tar.part").write_bytes(b"left over, and open to all")
    (tmp_path / "caches.tar.part").chmod(0o644)
    modes: list[int] = []
    previous = os.umask(0)
    try:
        export_caches(store, tmp_path / "caches.tar", lambda _: modes.append(_mode(tmp_path / "caches.tar.part")))
    finally:
        os.umask(previous)
    assert modes == [0o600, 0o600]
    assert _mode(tmp_path / "caches.tar") == 0o600
    store.close()


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_sparse_member_that_claims_a_petabyte_is_refused(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    member = tarfile.TarInfo(f"{key_of(1)}.safetensors")
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": member.name,
        "GNU.sparse.realsize": str(1 << 50),
    }
    data = b"0\n".ljust(512, b"\0")  # no part of it holds anything
    member.size = len(data)
    with tarfile.open(tmp_path / "bomb.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(data))
    with tarfile.open(tmp_path / "bomb.tar") as archive:
        (found,) = archive.getmembers()
        assert (found.issparse(), found.size) == (True, 1 << 50)
    report = import_caches(store, tmp_path / "bomb.tar")
    assert (report.added, report.refused) == (0, (member.name,))
    store.close()


# ---- verify, beside others ------------------------------------------------------------------------------------------


def test_what_is_evicted_or_deleted_while_verify_reads_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = DiskStore(tmp_path, 0), DiskStore(tmp_path, 0)
    put(store, 1, 2, 3, 4)
    store.files.path(key_of(4)).unlink()  # this one is missing
    rows = store.catalog.rows

    def rows_then_change() -> Any:
        found = rows()
        monkeypatch.setattr(store.catalog, "rows", rows)
        other.files.remove([key_of(1)])
        other.catalog.mark_lost([key_of(1)])
        other.drop_references("a", [key_of(2)])
        return found

    monkeypatch.setattr(store.catalog, "rows", rows_then_change)
    report = verify(store)
    assert (report.missing, report.bad, report.orphans) == ((key_of(4),), (), ())
    for opened in (store, other):
        opened.close()
