"""A first chunk's own cache: full prefill's rows, found again, and gone with its chunk however that goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.prompt import Tokens
from prophetkv_rag.store import ChunkStore, MemoryStore
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.upkeep import clear, gc
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

DOCUMENT = list(CORPUS[:4])
ENCODINGS = [
    {"lead_in": CORPUS[5]},
    {"encoding": "previous:2"},
    {"encoding": "previous:2", "lead_in": CORPUS[5]},
    {"encoding": "neighbours:1"},
]
BEHIND = [[DOCUMENT[1]], [DOCUMENT[0]], [DOCUMENT[1]], [DOCUMENT[2]]]


@pytest.fixture(params=["memory", "disk", "disk without a RAM tier"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    opened: ChunkStore = MemoryStore()
    if request.param != "memory":
        opened = DiskStore(tmp_path / "store", ram_bytes=0 if "without" in request.param else 1 << 26)
    yield opened
    opened.close()


def engine_on(store: ChunkStore, first_chunk: str = "opening", **settings: str) -> ProphetKVEngine:
    config = ProphetKVConfig(first_chunk=first_chunk, **{"encoding": "previous:2"} | settings)
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=config, store=store)
    engine.add_chunks(DOCUMENT, behind=BEHIND if config.encoding.startswith("neighbours") else None)
    return engine


def opening(engine: ProphetKVEngine) -> tuple[int, ...]:
    return Tokens(engine.tokenizer).default_encoding_prefix()


def prompt(engine: ProphetKVEngine, *chunks: str) -> Prompt:
    return Prompt(opening(engine), chunks or (DOCUMENT[2], DOCUMENT[0], DOCUMENT[1]), "\nWhat is the moon?")


def own_key(engine: ProphetKVEngine, text: str) -> str:
    """By an engine that encodes chunks behind the opening alone."""
    config = ProphetKVConfig(encoding="plain", namespace=engine.config.namespace)
    return ProphetKVEngine(engine.model, engine.tokenizer, config=config, store=MemoryStore()).library.key_of(text)


def settled(engine: ProphetKVEngine, *chunks: str):
    found = engine.prefill(prompt(engine, *chunks), recompute_ratio=0.1)
    engine.store.flush()
    return found


@pytest.mark.parametrize("settings", ENCODINGS, ids=str)
def test_rows_are_full_prefills_and_cost_nothing_the_second_time(store, settings):
    engine = engine_on(store, **settings)
    wanted = engine.prefill(prompt(engine), recompute_ratio=1.0)
    first, again = settled(engine), settled(engine)
    end = engine.read(prompt(engine)).chunks[0].stop
    stale = settled(engine_on(store, "cached", **settings))
    for found in (first, again):
        for layer, full in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
            torch.testing.assert_close(layer.keys[:, :, :end], full.keys[:, :, :end], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(layer.values[:, :, :end], full.values[:, :, :end], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(layer.values[:, :, :end], stale.past_key_values.layers[-1].values[:, :, :end], atol=1e-3)
    assert [chunk.status for chunk in first.report.chunks] == ["miss", "hit", "hit"]
    assert [chunk.status for chunk in again.report.chunks] == ["hit", "hit", "hit"]
    assert again.report.chunks[0].behind == 0
    assert again.report.chunks[1].behind == stale.report.chunks[1].behind
    assert torch.equal(first.recomputed, again.recomputed)
    assert not set(again.recomputed.tolist()) & set(range(end))
    assert again.report.recomputed_tokens == stale.report.recomputed_tokens  # no more than the ratio says
    assert again.report.charged_ratio <= stale.report.charged_ratio


def test_computed_ahead_it_is_the_same_one(store):
    """`add_second` is what prompts do one by one: the same rows, of the same chunks, gone with them."""
    engine = engine_on(store)
    wanted = engine_on(MemoryStore())
    before = store.stats().chunks
    assert engine.library.add_second(DOCUMENT) == 3  # the document's first chunk needs none
    assert engine.library.add_second(DOCUMENT) == 0
    assert store.stats().chunks == before + 3
    for text in DOCUMENT:
        found = settled(engine, text, DOCUMENT[3])
        assert [chunk.status for chunk in found.report.chunks] == ["hit", "hit"]
        assert found.report.chunks[0].behind == 0
        torch.testing.assert_close(found.logits, settled(wanted, text, DOCUMENT[3]).logits, atol=1e-5, rtol=1e-5)
    assert store.stats().chunks == before + 3
    engine.remove_chunks([engine.library.key_of(text) for text in DOCUMENT])
    assert not store.known([own_key(engine, text) for text in DOCUMENT])
    assert store.stats().chunks == 0
    assert engine_on(MemoryStore(), encoding="plain").library.add_second(DOCUMENT) == 0


def test_what_is_exact_already_has_no_second_cache(store):
    """A document's first chunk stands behind nothing else."""
    engine = engine_on(store)
    before = store.stats().chunks
    found = settled(engine, DOCUMENT[0], DOCUMENT[1])
    assert [chunk.status for chunk in found.report.chunks] == ["hit", "hit"]
    assert store.stats().chunks == before
    assert engine.prefill(prompt(engine), recompute_ratio=1.0).report.recomputed_tokens  # nor where all is computed
    assert store.stats().chunks == before


def test_behind_another_opening_it_is_as_any_other_or_recomputed_whole(store):
    engine = engine_on(store)
    elsewhere = Prompt("So: ", (DOCUMENT[2], DOCUMENT[0]), "\nWhat?")
    first = engine.read(elsewhere).chunks[0]
    rows = set(range(first.start, first.stop))
    found = engine.prefill(elsewhere, recompute_ratio=0.3)
    assert [chunk.behind for chunk in found.report.chunks] == [0, 0]
    assert set(found.recomputed.tolist()) & rows  # it is not exact, so it may be picked
    assert found.report.recomputed_tokens == int(0.3 * found.report.chunk_tokens)
    exact = engine.prefill(elsewhere, strategy="prophetkv:first_chunk=exact", recompute_ratio=0.1)
    assert set(exact.recomputed.tolist()) >= rows


def test_what_is_recomputed_where_nobody_says(store):
    """A twentieth of what is exact or encoded behind others, a fifth of what is not; of all, if the first is not."""
    engine = engine_on(store)
    tokens = [len(chunk.input_ids) for chunk in engine.read(prompt(engine)).chunks]
    shares = [0.05, 0.2, 0.05]  # exact, the document's first, the one behind it
    report = engine.prefill(prompt(engine)).report
    wanted = sum(share * count for share, count in zip(shares, tokens, strict=True)) / sum(tokens)
    assert report.recompute_ratio == pytest.approx(wanted)
    assert report.recomputed_tokens == int(wanted * sum(tokens))
    elsewhere = Prompt("So: ", (DOCUMENT[2], DOCUMENT[0], DOCUMENT[1]), "\nWhat?")
    assert engine.prefill(elsewhere).report.recompute_ratio == 0.2
    assert engine.prefill(prompt(engine), strategy="prophetkv:first_chunk=cached").report.recompute_ratio == 0.2
    assert engine.prefill(prompt(engine), recompute_ratio=0.0).report.recompute_ratio == 0.0
    plain = engine_on(store, encoding="plain")
    wanted = (0.05 * tokens[0] + 0.2 * sum(tokens[1:])) / sum(tokens)
    assert plain.prefill(prompt(plain)).report.recompute_ratio == pytest.approx(wanted)


def test_the_chunk_again_in_the_middle_is_the_other_one(store):
    found = settled(engine_on(store), DOCUMENT[2], DOCUMENT[0], DOCUMENT[2])
    assert [chunk.behind for chunk in found.report.chunks] == [0, 0, 2]


def test_it_is_an_engines_that_encodes_behind_the_opening_alone(store):
    settled(engine_on(store))
    plain = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(encoding="plain"), store=store)
    assert own_key(plain, DOCUMENT[2]) in store
    assert plain.library.key_of(DOCUMENT[2]) in store
    plain.add_chunks(DOCUMENT[2:3])
    plain.remove_chunks([plain.library.key_of(DOCUMENT[2])])
    assert plain.library.key_of(DOCUMENT[2]) in store  # the other engine's chunk still has it


@pytest.mark.parametrize("how", ["remove", "delete", "gc", "clear", "other process"])
def test_it_goes_with_its_chunk(store, how, tmp_path):
    engine = engine_on(store)
    settled(engine)
    key, own = engine.library.key_of(DOCUMENT[2]), own_key(engine, DOCUMENT[2])
    assert own in store
    assert store.known([own])
    if how in ("gc", "clear", "other process") and isinstance(store, MemoryStore):
        pytest.skip("of a directory")
    if how == "remove":
        assert engine.remove_chunks([key]) == [key]
    elif how == "delete":
        store.delete([key])
    elif how == "gc":
        with store.catalog.transaction() as run:
            run.execute("DELETE FROM refs WHERE key = ?", (key,))
        gc(store, grace_s=-10)
    elif how == "clear":
        clear(store, engine.config.namespace)
    else:
        with closing(DiskStore(store.directory)) as other:
            other.drop_references("engine", [key])
        store.forget_deleted()
        store.flush()
    assert own not in store
    assert not store.known([own])
    assert store.find(own, fingerprint=engine.identity.fingerprint, input_ids=None).cache is None
    if isinstance(store, DiskStore):
        with store.catalog.transaction(is_write=False) as run:
            assert run.execute("SELECT count(*) FROM refs WHERE owner LIKE 'chunk:%'").fetchone() == (0,)
        assert not store.files.path(own).exists()


def test_it_stays_while_somebody_refers_to_it(store):
    engine = engine_on(store)
    plain = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(encoding="plain"), store=store)
    plain.add_chunks(DOCUMENT[2:3])
    settled(engine)
    engine.remove_chunks([engine.library.key_of(DOCUMENT[2])])
    assert plain.library.key_of(DOCUMENT[2]) in store


def test_nothing_is_kept_of_a_chunk_that_nobody_added(store):
    engine = engine_on(store)
    before = store.stats().chunks
    for _ in range(2):
        found = settled(engine, CORPUS[6], DOCUMENT[0])
        assert found.report.chunks[0].status in ("hit", "miss")
    assert not store.known([own_key(engine, CORPUS[6])])
    assert store.stats().chunks == before


def test_a_damaged_one_is_computed_again(tmp_path):
    with closing(DiskStore(tmp_path / "store", ram_bytes=0)) as store:
        engine = engine_on(store)
        wanted = settled(engine).logits
        path = store.files.path(own_key(engine, DOCUMENT[2]))
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(bytes(data))
        found = settled(engine)
        assert found.report.chunks[0].status == "corrupt"
        assert torch.equal(found.logits, wanted)
        assert settled(engine).report.chunks[0].status == "hit"


def test_a_namespace_has_its_own(tmp_path):
    with closing(DiskStore(tmp_path / "store")) as store:
        engines = [
            ProphetKVEngine(
                tiny_llama(),
                tiny_tokenizer(),
                config=ProphetKVConfig(first_chunk="exact", encoding="previous:2", namespace=name),
                store=store,
            )
            for name in ("a", "b")
        ]
        for engine in engines:
            engine.add_chunks(DOCUMENT)
            assert settled(engine).report.chunks[0].status == "miss"
        clear(store, "a")
        assert settled(engines[1]).report.chunks[0].status == "hit"
        with store.catalog.transaction(is_write=False) as run:
            fingerprints = {row[0] for row in run.execute("SELECT fingerprint FROM chunks")}
            named = dict(run.execute("SELECT fingerprint, namespace FROM identities"))
        assert {named[one] for one in fingerprints} == {"b"}


def test_of_one_exact_chunk_nothing_is_recomputed(store):
    engine = engine_on(store)
    for chunk in (DOCUMENT[0], DOCUMENT[2]):
        found = settled(engine, chunk)
        assert found.recomputed.shape == (0,)
        full = engine.prefill(prompt(engine, chunk), strategy="full_prefill")
        torch.testing.assert_close(found.logits, full.logits, atol=1e-4, rtol=1e-4)
