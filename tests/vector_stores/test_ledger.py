"""Which record carries which cache: in RAM, in a file, from several processes, and when the file cannot be used."""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import StoreError
from prophetkv_rag.store import MemoryStore
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.vector_stores import Record, StoreLink, UnreadableError
from prophetkv_rag.vector_stores.ledger import RecordLedger, ledger_of
from prophetkv_rag.vector_stores.store_lock import store_lock
from tests.forked import Child
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

A, B = text_of(8, seed=0), text_of(8, seed=1)


class Unreadable:
    """A vector store that tells nothing."""

    given = None

    def name(self, given: Any) -> str:
        return str(given)

    def read(self, names: Any) -> Any:
        raise UnreadableError

    def read_all(self) -> Any:
        raise UnreadableError


@pytest.fixture(params=["RAM", "file"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> RecordLedger:
    return RecordLedger(None if request.param == "RAM" else tmp_path / "records.sqlite")


def test_records_of_several_owners(ledger: RecordLedger) -> None:
    assert ledger.put("one", [("a", "doc", "k1"), ("b", "doc", "k2"), ("c", "", "")]) == {}
    assert ledger.put("two", [("a", "", "k1")]) == {}
    assert ledger.put("one", [("a", "doc", "k3"), ("b", "doc", "k2")]) == {"a": {"k1"}}
    assert sorted(ledger.rows("one")) == [("a", "doc", "k3"), ("b", "doc", "k2"), ("c", "", "")]
    assert sorted(ledger.of_document("one", "doc")) == ["a", "b"]
    assert ledger.of_document("one", "c") == ["c"]
    assert ledger.carried("one", ["k1", "k2", "k3"]) == {"k2", "k3"}
    assert ledger.known("one", ["a", "z"]) == {"a"}
    assert ledger.remove("one", ["c", "z"]) == [("c", "", "")]
    assert sorted(ledger.remove("one", ["a", "b"])) == [("a", "doc", "k3"), ("b", "doc", "k2")]
    assert ledger.names("one") == []
    assert ledger.names("two") == ["a"]


def test_one_id_may_carry_several(ledger: RecordLedger) -> None:
    ledger.put("one", [("a", "", "k1"), ("a", "", "k2")])
    assert ledger.names("one") == ["a"]
    assert ledger.put("one", [("a", "", "k2")]) == {"a": {"k1"}}


def test_more_ids_than_a_query_takes(ledger: RecordLedger) -> None:
    rows = [(f"n{number}", "", f"k{number}") for number in range(40_000)]
    ledger.put("one", rows)
    assert ledger.carried("one", [key for _, _, key in rows]) == {key for _, _, key in rows}
    assert len(ledger.remove("one", [name for name, _, _ in rows])) == len(rows)


def test_writers_at_once(ledger: RecordLedger, tmp_path: Path) -> None:
    def write(owner: str) -> None:
        other = ledger if ledger.path is None else RecordLedger(ledger.path)
        for number in range(20):
            other.put(owner, [(f"{number}", "", owner)])

    threads = [threading.Thread(target=write, args=(f"o{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(ledger.names(f"o{number}")) for number in range(4)] == [20] * 4


def test_it_lies_beside_the_caches(tmp_path: Path) -> None:
    memory, disk = MemoryStore(), DiskStore(tmp_path)
    assert ledger_of(memory).path is None
    assert ledger_of(memory) is ledger_of(memory) is not ledger_of(MemoryStore())
    assert ledger_of(disk).path == tmp_path / "records.sqlite"
    assert disk.verify(repair=True).checked == 0
    assert (tmp_path / "records.sqlite").exists()
    disk.close()
    reader = DiskStore(tmp_path, policy="read_only")
    assert ledger_of(reader).path is None
    reader.close()


def test_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "records.sqlite").write_bytes(b"no database, but long enough to look like one" * 40)
    with pytest.raises(StoreError, match=r"records\.sqlite"):
        RecordLedger(tmp_path / "records.sqlite")


def test_a_file_that_fails_later_fails_no_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The vector store is written already then: the caches stay for `cache_existing` to find."""
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), store=DiskStore(tmp_path))
    link = StoreLink(engine, "docs", Unreadable())
    link.commit(link.begin([Record("a", A, None)]), None)
    with sqlite3.connect(tmp_path / "records.sqlite") as run:
        run.execute("DROP TABLE records")
    with caplog.at_level(logging.WARNING):
        link.commit(link.begin([Record("b", B, None)]), None)
    with pytest.raises(StoreError):
        link.forget(["a"])
    assert "no such table" in engine.store.failures.reason
    assert len(engine.store.references(link.owner)) == 2
    engine.store.close()


def test_caches_that_cannot_be_deleted_can_be_deleted_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to be deleted is deleted; else the delete says so, and may be tried again."""
    store = MemoryStore()
    link = StoreLink(ProphetKVEngine(tiny_llama(), tiny_tokenizer(), store=store), "docs", Unreadable())
    link.commit(link.begin([Record("a", A, None, "doc"), Record("b", B, None)]), None)
    rows = sorted(link.ledger.rows(link.owner))

    def fail(*_: Any) -> None:
        msg = "disk full"
        raise StoreError(msg)

    with monkeypatch.context() as patched:
        patched.setattr(store, "drop_references", fail)
        with pytest.raises(StoreError, match="disk full"):
            link.forget(["a"])
    assert sorted(link.ledger.rows(link.owner)) == rows
    link.forget(["a"])
    assert len(store.references(link.owner)) == store.stats().chunks == 1


def test_a_child_does_not_wait_for_its_parents_threads() -> None:
    ledger = RecordLedger()
    ledger.put("one", [("a", "", "k1")])
    with store_lock(ledger, "one").held():
        assert Child(lambda: _use(ledger)).result() == ["a", "b"]
    assert ledger.names("one") == ["a"]


def _use(ledger: RecordLedger) -> list[str]:
    with store_lock(ledger, "one").held():
        ledger.put("one", [("b", "", "k2")])
        return sorted(ledger.names("one"))
