"""Chunks that several owners, threads and prompts want at the same time, and stores that fail."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prophetkv_rag import ContextWindowError, Prompt, ProphetKVConfig, ProphetKVEngine, StoreError
from prophetkv_rag.store.base import ChunkStore
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.memory import MemoryStore
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

TEXT = CORPUS[0]
MODEL = tiny_llama()


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    opened: ChunkStore = MemoryStore() if request.param == "memory" else DiskStore(tmp_path / "store", ram_bytes=0)
    yield opened
    opened.close()


def make_engine(store: ChunkStore, **settings: Any) -> ProphetKVEngine:
    return ProphetKVEngine(MODEL, tiny_tokenizer(), config=ProphetKVConfig(**settings), store=store)


def statuses(engine: ProphetKVEngine, text: str = TEXT) -> list[str]:
    return [chunk.status for chunk in engine.prefill(f"Read this: {text} So?").report.chunks]


def before_call(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, action: Callable[[], Any]) -> None:
    """Run `action` once, just before `target.name` is called."""
    real = getattr(target, name)
    pending = [action]

    def call(*args: Any, **kwargs: Any) -> Any:
        if pending:
            pending.pop()()
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, call)


def test_a_cache_that_its_last_owner_drops_while_another_adds_it_is_computed_again(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(store)
    keys = engine.add_chunks([TEXT], owner="one")
    before_call(monkeypatch, store, "add_references", lambda: store.drop_references("one", keys))
    assert engine.add_chunks([TEXT], owner="two") == keys
    assert keys[0] in store
    assert store.references("two") == keys
    assert statuses(engine) == ["hit"]
    assert [key for key, _ in store.entries(engine.identity.fingerprint)] == keys


def test_owners_that_add_and_remove_one_chunk_end_with_what_the_last_one_wants(store: ChunkStore) -> None:
    engine = make_engine(store)
    errors: list[BaseException] = []

    def use(owner: str) -> None:
        try:
            for _ in range(20):
                keys = engine.add_chunks([TEXT], owner=owner)
                assert keys[0] in store
                assert [match.key for match in engine.chunk_index.find(TEXT)] == keys
                engine.remove_chunks(keys, owner=owner)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.stats().chunks == 0
    assert len(engine.chunk_index) == 0


def test_a_chunk_that_is_added_while_its_last_owner_drops_it_is_found_in_prompts(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(store)
    keys = engine.add_chunks([TEXT], owner="one")
    drop_references, is_dropped = store.drop_references, threading.Event()

    def slow(*args: Any) -> list[str]:
        dropped = drop_references(*args)
        is_dropped.set()
        time.sleep(0.5)
        return dropped

    monkeypatch.setattr(store, "drop_references", slow)
    removing = threading.Thread(target=lambda: engine.remove_chunks(keys, owner="one"))
    removing.start()
    assert is_dropped.wait(60)
    engine.add_chunks([TEXT], owner="two")
    removing.join()
    assert statuses(engine) == ["hit"]


def test_a_chunk_whose_text_is_learned_from_a_bad_blob_is_computed(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, ram_bytes=0)
    engine = make_engine(store)
    (key,) = engine.add_chunks([engine.tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    (blob,) = tmp_path.rglob("*.safetensors")
    blob.write_bytes(blob.read_bytes()[:-1])
    computed: list[tuple[int, int]] = []
    assert engine.add_chunks([TEXT], progress=lambda *counts: computed.append(counts)) == [key]
    assert computed == [(1, 1)]
    assert key in store
    assert [found for found, _ in store.entries(engine.identity.fingerprint)] == [key]
    assert statuses(engine) == ["hit"]


def test_a_chunk_that_is_deleted_between_layout_and_loading_does_not_come_back(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(store)
    keys = engine.add_chunks([TEXT])
    before_call(monkeypatch, engine.library, "load", lambda: engine.remove_chunks(keys))
    assert statuses(engine) == ["miss"]
    assert keys[0] not in store
    assert store.stats().chunks == 0
    assert statuses(engine) == []


def test_a_lost_cache_that_somebody_refers_to_is_stored_again(tmp_path: Path) -> None:
    engine = make_engine(DiskStore(tmp_path, ram_bytes=0))
    engine.add_chunks([TEXT])
    (blob,) = tmp_path.rglob("*.safetensors")
    blob.unlink()
    assert [statuses(engine), statuses(engine)] == [["miss"], ["hit"]]
    engine.store.flush()
    blob.write_bytes(b"nonsense")
    assert [statuses(engine), statuses(engine)] == [["corrupt"], ["hit"]]


def test_chunks_that_were_never_added_do_not_fill_the_store(store: ChunkStore) -> None:
    engine = make_engine(store)
    prompt = Prompt("Read: ", list(CORPUS), " So?")
    first = engine.prefill(prompt)
    assert {chunk.status for chunk in first.report.chunks} == {"miss"}
    assert store.stats().chunks == 0
    engine.add_chunks(list(CORPUS))
    added = engine.prefill(prompt)
    assert {chunk.status for chunk in added.report.chunks} == {"hit"}
    torch.testing.assert_close(added.logits, first.logits, atol=1e-4, rtol=1e-4)


def test_removing_needs_no_owner_where_adding_had_none(store: ChunkStore) -> None:
    engine = make_engine(store)
    keys = engine.add_chunks([TEXT])
    assert engine.remove_chunks(keys) == keys


def test_a_chunk_that_does_not_fit_behind_the_encoding_prefix_is_refused(store: ChunkStore) -> None:
    prefix = tuple(range(3, 103))
    engine = make_engine(store, encoding_prefix=prefix)
    chunk = [5] * (engine.context_window - 50)
    with pytest.raises(
        ContextWindowError, match=r"chunk 1 of the prompt has 1998 tokens, with the encoding prefix 2098"
    ):
        engine.prefill(Prompt([1], [[7, 8], chunk], [9]))


def test_a_catalog_that_fails_does_not_fail_the_query(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DiskStore(tmp_path)
    engine = make_engine(store)
    engine.add_chunks([TEXT])
    store.close()
    with pytest.raises(StoreError):
        store.stats()
    with caplog.at_level(logging.WARNING):
        assert [statuses(engine), statuses(engine)] == [["hit"], ["hit"]]
    assert len([record for record in caplog.records if "other processes" in record.getMessage()]) == 1
