"""Where caches came from is told, by a prompt's report, counters and `cache stats`; and what a limit in memory does."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import chromadb
import pytest

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine, StoreError
from prophetkv_rag.chroma import open_store
from prophetkv_rag.errors import InputError
from prophetkv_rag.prompt.chunk_index import text_entry
from prophetkv_rag.report.report import ReuseReport
from prophetkv_rag.store.catalog.counts import all_counts, hits_by_tier
from prophetkv_rag.store.disk.statistics import Usage, usage
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.tiered import TieredStore
from prophetkv_rag.store.memory import MemoryStore
from tests.store.caches import FINGERPRINT, IDENTITY, found_in, ids_of, key_of, make_cache
from tests.store.faulty_files import FaultyFileSystem
from tests.tiny import save_tiny, text_of, tiny_llama, tiny_tokenizer

MODEL = tiny_llama()
TEXTS = [text_of(20, seed=seed) for seed in range(4)]
REMOTE = "faulty://bucket/caches"


def ask(engine: ProphetKVEngine, *texts: str, strategy: str | None = None) -> ReuseReport:
    report = engine.prefill("Read: " + " ".join(texts) + " So?", strategy=strategy).report
    engine.store.flush()
    return report


@pytest.mark.parametrize("comes", ["at once", "when it is waited for"])
def test_a_report_and_the_counters_say_which_tier_had_each_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: str
) -> None:
    FaultyFileSystem.clear()
    store = TieredStore(tmp_path, remote=REMOTE, remote_timeout_s=30.0)
    engine = ProphetKVEngine(MODEL, tiny_tokenizer(), store=store)
    keys = engine.add_chunks(TEXTS)
    store.flush()
    store.drop_from_memory(keys[1:])
    for key in keys[2:]:
        store.files.remove([key])
    store.catalog.mark_lost(keys[2:])
    store.remote.files.remove(engine.identity.fingerprint, keys[3])
    (row,) = usage(store)
    assert (row.stored, row.in_remote, row.missing_tokens) == (2, 4, 0), "as far as the catalog knows"
    expect = store.expect

    def expect_and_get(keys: Iterable[str], *, fingerprint: str) -> None:
        expect(keys, fingerprint=fingerprint)
        store._fetches.flush()

    with monkeypatch.context() as patch:
        if comes == "at once":
            patch.setattr(store, "expect", expect_and_get)
        report = ask(engine, *TEXTS)
    assert [(chunk.status, chunk.tier) for chunk in report.chunks] == [
        ("hit", "ram"),
        ("hit", "disk"),
        ("hit", "remote"),
        ("miss", "computed"),
    ]
    assert report.tiers == {"ram": 1, "disk": 1, "remote": 1, "computed": 1}
    assert [chunk["tier"] for chunk in report.to_dict()["chunks"]] == ["ram", "disk", "remote", "computed"]
    counts = store.stats()
    assert (counts.hits, counts.ram_hits, counts.remote_hits, counts.misses) == (3, 1, 1, 1)
    assert ask(engine, *TEXTS).tiers == {"ram": 4}
    assert ask(engine, *TEXTS, strategy="full_prefill").tiers == {}, "nothing was needed"
    store.close()
    again = DiskStore(tmp_path)
    assert hits_by_tier(all_counts(again.catalog)) == {"ram": 5, "disk": 1, "remote": 1}
    again.close()


def test_in_memory_everything_comes_from_ram() -> None:
    engine = ProphetKVEngine(MODEL, tiny_tokenizer())
    engine.add_chunks(TEXTS[:1])
    assert ask(engine, TEXTS[0]).tiers == {"ram": 1}


def test_usage_says_what_the_next_prompt_costs_and_what_the_remote_has(tmp_path: Path) -> None:
    """Against the same sums over the chunks, taken one by one."""
    FaultyFileSystem.clear()
    store = TieredStore(tmp_path, 0, remote=REMOTE, remote_timeout_s=30.0)
    uses = {1: 0, 2: 3, 3: 5, 4: 1}
    for seed, count in uses.items():
        store.put(key_of(seed, 4 + seed), make_cache(seed, 4 + seed), fingerprint=FINGERPRINT)
        store.add_references("a", [key_of(seed, 4 + seed)])
        for _ in range(count):
            store.get(key_of(seed, 4 + seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed, 4 + seed))
    store.flush()
    store.space.flush_uses()
    for seed in (2, 3):  # neither is on disk any more, and one is not in the remote either
        store.files.remove([key_of(seed, 4 + seed)])
        store.catalog.mark_lost([key_of(seed, 4 + seed)])
    store.remote.records.remove([key_of(3, 7)])
    (row,) = usage(store)
    assert row.next_chunk_s is None, "it was never measured"
    store.describe(FINGERPRINT, model="m", namespace="n", seconds_per_token=0.5)
    (row,) = usage(store)
    weights = {seed: count + 1 for seed, count in uses.items()}
    expected = Usage("a", "m", "n", 4, 2, 26, row.nbytes, 9, 3, row.remote_nbytes, 7, 3.5, None)
    assert replace(row, next_chunk_s=None) == expected
    assert row.next_chunk_s == pytest.approx(0.5 * 7 * weights[3] / sum(weights.values()))
    assert row.remote_nbytes == sum(
        len(file.getvalue()) for name, file in FaultyFileSystem.store.items() if key_of(3, 7) not in name
    )
    store.close()
    plain = DiskStore(tmp_path, 0)
    (row,) = usage(plain)
    assert (row.in_remote, row.missing_tokens) == (0, 13), "a store without the remote has to compute both"
    plain.close()


# ---- limits in memory -----------------------------------------------------------------------------------------------

SIZE = make_cache(1).nbytes


def put(store: MemoryStore, *seeds: int) -> None:
    for seed in seeds:
        store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT, entry=text_entry(f"the text of {seed}"))


def test_a_store_in_memory_keeps_to_its_limit_and_knows_what_had_to_go() -> None:
    store = MemoryStore(3 * SIZE)
    put(store, 1, 2, 3)
    assert not store.accepts_new()
    assert found_in(store, 1) == [True]
    put(store, 4)
    assert found_in(store, 1, 2, 3, 4) == [True, False, True, True], "the least recently used one"
    assert (store.stats().nbytes, store.stats().chunks, store.stats().evictions) == (3 * SIZE, 3, 1)
    assert store.stats().max_nbytes == 3 * SIZE
    assert key_of(2) not in store
    assert store.knows(key_of(2))
    assert len(list(store.entries(FINGERPRINT))) == 4, "its text is still found in prompts"
    put(store, 2)
    assert found_in(store, 2, 1) == [True, False]
    store.delete([key_of(2), key_of(1)])
    assert (store.stats().nbytes, store.knows(key_of(1)), store.accepts_new()) == (2 * SIZE, False, True)
    store.put(key_of(5, 99), make_cache(5, 99), fingerprint=FINGERPRINT)
    assert key_of(5, 99) not in store, "larger than the limit"
    assert store.stats().nbytes == 2 * SIZE
    other = replace(IDENTITY, model="other").fingerprint
    assert store.get(key_of(4), fingerprint=other, input_ids=ids_of(4)) == (None, True)
    assert store.stats().nbytes == SIZE
    with pytest.raises(InputError, match="max_bytes is -1"):
        MemoryStore(-1)


def test_a_corpus_larger_than_memory_works() -> None:
    whole = ProphetKVEngine(MODEL, tiny_tokenizer(), config=ProphetKVConfig(recompute_ratio=0.0))
    whole.add_chunks(TEXTS)
    store = MemoryStore(whole.store.stats().nbytes // 2)
    engine = ProphetKVEngine(MODEL, tiny_tokenizer(), config=ProphetKVConfig(recompute_ratio=0.0), store=store)
    engine.add_chunks(TEXTS)
    for text in TEXTS * 2:
        prompt = "Read: " + text + " So?"
        result = engine.prefill(prompt)
        assert len(result.report.chunks) == 1
        assert result.logits.sub(whole.prefill(prompt).logits).abs().max() < 1e-4
        assert store.stats().nbytes <= whole.store.stats().nbytes // 2
    assert ask(engine, TEXTS[-1]).tiers == {"ram": 1}


def test_an_ephemeral_client_s_limit_is_kept_and_what_memory_has_not_is_refused() -> None:
    client = chromadb.EphemeralClient()
    for settings, limit in (
        ({}, None),
        ({"max_bytes": 7}, 7),
        ({"ram_bytes": 9, "max_bytes": 7, "policy": "eager", "encryption_key": b"k" * 32}, 7),
    ):
        store = open_store(client, **settings)
        assert isinstance(store, MemoryStore)
        assert store.max_bytes == limit
    for name, value in {"policy": "on_first_use", "blob_format": "int8", "namespace_max_bytes": 5}.items():
        with pytest.raises(InputError, match=f"{name}: an EphemeralClient has no disk"):
            open_store(client, **{name: value})


@pytest.mark.parametrize("where", ["in memory", "in a directory"])
def test_a_server_without_a_database_keeps_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    pytest.importorskip("fastapi")
    from prophetkv_rag.cli.serving import ServedCaches, open_served

    monkeypatch.chdir(tmp_path)
    model, caches = str(save_tiny(tmp_path / "model")), tmp_path / "caches" if "directory" in where else None
    limit = 60_000
    served = ServedCaches.asked(None, caches, None, str(limit), None)
    with open_served(served, model, ProphetKVConfig()) as (engine, _):
        engine.add_chunks(TEXTS)
        assert engine.store.stats().max_nbytes == limit
        assert 0 < engine.store.stats().nbytes <= limit
        assert len(engine.chunk_index) == len(TEXTS)


# ---- a store that fails ---------------------------------------------------------------------------------------------


def test_registering_texts_where_the_store_fails_is_noted_once_and_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path, 0)
    engine = ProphetKVEngine(MODEL, tiny_tokenizer(), store=store)

    def fails(*_: object) -> None:
        msg = "database or disk is full"
        raise StoreError(msg)

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(store.catalog, "add_references", fails)
        assert [engine.library.register(text, owner="prompt") for text in TEXTS] == [None] * 4
        assert len(caplog.records) == 1, caplog.text
        assert ask(engine, *TEXTS).chunks == []
    assert all(engine.library.register(text, owner="prompt") for text in TEXTS)
    assert ask(engine, *TEXTS).tiers == {"computed": 4}
    store.close()
