"""Chunks that are encoded behind others: right rows, whoever computes them, and no trace of what was deleted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from prophetkv_rag import InputError, Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.model import RopeTables, cache_argument
from prophetkv_rag.store import ChunkCache, ChunkStore, MemoryStore
from prophetkv_rag.store.disk.store import DiskStore
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

DOCUMENT = list(CORPUS[:5])
PREVIOUS = ProphetKVConfig(encoding="previous:2", first_chunk="cached")
ALL_PREVIOUS = ProphetKVConfig(encoding="previous:16", first_chunk="cached")
NEIGHBOURS = ProphetKVConfig(encoding="neighbours:2", first_chunk="cached")
NEAREST = [[DOCUMENT[2], DOCUMENT[1]], [DOCUMENT[4], DOCUMENT[0]], [DOCUMENT[1]], [], [DOCUMENT[0], DOCUMENT[2]]]


@pytest.fixture(params=["memory", "disk", "disk without a RAM tier"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    opened: ChunkStore = MemoryStore()
    if request.param != "memory":
        opened = DiskStore(tmp_path / "store", ram_bytes=0 if "without" in request.param else 1 << 26)
    yield opened
    opened.close()


def engine_on(store: ChunkStore, config: ProphetKVConfig) -> ProphetKVEngine:
    return ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=config, store=store)


def found(engine: ProphetKVEngine, text: str) -> ChunkCache | None:
    key = engine.library.key_of(text)
    return engine.store.find(key, fingerprint=engine.identity.fingerprint, input_ids=None).cache


def stored(engine: ProphetKVEngine, text: str) -> ChunkCache:
    cache = found(engine, text)
    assert cache is not None
    return cache


def rotated(engine: ProphetKVEngine, cache: ChunkCache, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    tables = RopeTables(torch.arange(start, start + cache.num_tokens))
    layers = zip(cache.keys, cache.values, engine.support.layers, strict=True)
    return [(tables.rotate(keys, found.rotation), values) for keys, values, found in layers]


def assert_same(
    given: list[tuple[torch.Tensor, torch.Tensor]], wanted: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    for one, other in zip(given, wanted, strict=True):
        for tensor, reference in zip(one, other, strict=True):
            torch.testing.assert_close(tensor, reference, rtol=0, atol=2e-5)


@torch.no_grad()
def full_prefill(engine: ProphetKVEngine, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    cache = DynamicCache()
    engine.model(torch.tensor([ids]), **cache_argument(engine.model, cache))
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def by_hand(engine: ProphetKVEngine, text: str, before: list[ChunkCache]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A chunk's rows by the model's own forward over a cache that is joined here: rotated where it stands."""
    prefix = list(engine.identity.prefix_ids)
    cache, start = DynamicCache(), len(prefix)
    for index, (keys, values) in enumerate(full_prefill(engine, prefix)):
        cache.update(keys[None], values[None], index)
    for one in before:
        for index, (keys, values) in enumerate(rotated(engine, one, start)):
            cache.update(keys[None], values[None], index)
        start += one.num_tokens
    ids = engine.tokens.chunk(text)
    with torch.no_grad():
        engine.model(
            torch.tensor([ids]),
            **cache_argument(engine.model, cache),
            position_ids=torch.arange(start, start + len(ids))[None],
            cache_position=torch.arange(start, start + len(ids)),
        )
    return [(layer.keys[0, :, start:], layer.values[0, :, start:]) for layer in cache.layers]


def place(engine: ProphetKVEngine, texts: list[str]) -> int:
    return len(engine.identity.prefix_ids) + sum(len(engine.tokens.chunk(text)) for text in texts)


# ---- what is computed


def test_behind_its_whole_document_a_chunk_is_that_of_full_prefill(store: ChunkStore) -> None:
    engine = engine_on(store, ALL_PREVIOUS)
    engine.add_chunks(DOCUMENT)
    ids = [*engine.identity.prefix_ids, *(token for text in DOCUMENT for token in engine.tokens.chunk(text))]
    wanted = full_prefill(engine, ids)
    for number, text in enumerate(DOCUMENT):
        start = place(engine, DOCUMENT[:number])
        cache = stored(engine, text)
        assert len(cache.behind.keys) == number
        rows = slice(start, start + cache.num_tokens)
        assert_same(rotated(engine, cache, start), [(keys[:, rows], values[:, rows]) for keys, values in wanted])


def test_documents_side_by_side_are_as_one_by_one() -> None:
    documents = [[f"{text} {number}" for text in CORPUS[: 2 + number]] for number in range(4)]
    texts = [text for document in documents for text in document]
    behind = [document[max(0, number - 2) : number] for document in documents for number in range(len(document))]
    together = engine_on(MemoryStore(), PREVIOUS)
    together.add_chunks(texts, behind=behind)
    for document in documents:
        alone = engine_on(MemoryStore(), PREVIOUS)
        alone.add_chunks(document)
        for text in document:
            one, other = stored(together, text), stored(alone, text)
            assert one.behind.keys == other.behind.keys
            assert set(one.behind.through) == set(other.behind.through)
            assert_same(list(zip(one.keys, one.values, strict=True)), list(zip(other.keys, other.values, strict=True)))


def test_a_chunk_that_is_added_later_stands_behind_stored_ones(store: ChunkStore) -> None:
    engine = engine_on(store, PREVIOUS)
    engine.add_chunks(DOCUMENT[:3])
    engine.add_chunks([DOCUMENT[3]], behind=[DOCUMENT[:3]])
    reference = engine_on(MemoryStore(), PREVIOUS)
    reference.add_chunks(DOCUMENT[:4])
    one, other = stored(engine, DOCUMENT[3]), stored(reference, DOCUMENT[3])
    assert one.behind == other.behind
    assert_same(list(zip(one.keys, one.values, strict=True)), list(zip(other.keys, other.values, strict=True)))


def test_behind_neighbours_a_chunk_is_that_of_their_own_caches_joined(store: ChunkStore) -> None:
    engine = engine_on(store, NEIGHBOURS)
    engine.add_chunks(DOCUMENT)  # alone at first
    engine.add_chunks(DOCUMENT, behind=NEAREST)
    plain = engine_on(MemoryStore(), ProphetKVConfig())
    plain.add_chunks(DOCUMENT)
    for text, nearest in zip(DOCUMENT, NEAREST, strict=True):
        before = [stored(plain, one) for one in nearest]
        cache = stored(engine, text)
        assert cache.behind.keys == tuple(engine.library.key_of(one) for one in nearest)
        assert cache.behind.through == ()
        assert_same(rotated(engine, cache, place(engine, nearest)), by_hand(engine, text, before))


def test_neighbours_that_stand_behind_others_themselves_leave_no_trace_of_those(store: ChunkStore) -> None:
    config = ProphetKVConfig(encoding="neighbours:2", index_batch_tokens=64)  # a chunk or two at a time
    engine, plain = engine_on(store, config), engine_on(MemoryStore(), ProphetKVConfig())
    plain.add_chunks(DOCUMENT)
    engine.add_chunks(DOCUMENT, behind=NEAREST)
    store.flush()
    others = [[DOCUMENT[(number + 3) % 5], DOCUMENT[(number + 4) % 5]] for number in range(5)]
    engine.add_chunks(DOCUMENT, behind=others, refresh=True)
    for text, nearest in zip(DOCUMENT, others, strict=True):
        cache = stored(engine, text)
        if cache.behind.keys == tuple(engine.library.key_of(one) for one in nearest):
            before = [stored(plain, one) for one in nearest]
            assert_same(rotated(engine, cache, place(engine, nearest)), by_hand(engine, text, before))
    assert sum(stored(engine, text).behind.traces != () for text in DOCUMENT) == 5


def test_what_is_told_through_others_is_a_trace_too(store: ChunkStore) -> None:
    engine = engine_on(store, PREVIOUS)
    engine.add_chunks(DOCUMENT)
    keys = [engine.library.key_of(text) for text in DOCUMENT]
    behind = stored(engine, DOCUMENT[4]).behind
    assert behind.keys == tuple(keys[2:4])
    assert set(behind.through) == set(keys[:2])
    assert behind.is_chained


def test_neighbours_at_once_are_as_in_two_passes(store: ChunkStore) -> None:
    engine = engine_on(store, NEIGHBOURS)
    engine.add_chunks(DOCUMENT, behind=NEAREST)
    other = engine_on(MemoryStore(), NEIGHBOURS)
    other.add_chunks(DOCUMENT)
    other.add_chunks(DOCUMENT, behind=NEAREST)
    for text in DOCUMENT:
        one, two = stored(engine, text), stored(other, text)
        assert one.behind == two.behind
        assert_same(list(zip(one.keys, one.values, strict=True)), list(zip(two.keys, two.values, strict=True)))


MIXED = ProphetKVConfig(encoding="previous:2+neighbours:2", first_chunk="cached")
ORDER = [[], [DOCUMENT[0]], [], [], []]


def mixed_on(store: ChunkStore) -> ProphetKVEngine:
    """The first two are a document, the others one each."""
    engine = engine_on(store, MIXED)
    engine.add_chunks(DOCUMENT, behind=ORDER)
    engine.library.add(DOCUMENT, owner="engine", behind=NEAREST, as_neighbours=True)
    return engine


def test_neighbours_stand_before_what_is_a_whole_document_and_nothing_else(store: ChunkStore) -> None:
    engine = mixed_on(store)
    keys = [engine.library.key_of(text) for text in DOCUMENT]
    found = [stored(engine, text).behind for text in DOCUMENT]
    assert [behind.keys for behind in found] == [(), (keys[0],), (keys[1],), (), (keys[0], keys[2])]
    assert [behind.is_chained for behind in found if behind.keys] == [True, False, False]
    assert [behind.through for behind in found] == [()] * 5  # the neighbour that stands behind another stood alone
    plain = engine_on(MemoryStore(), ProphetKVConfig(encoding="plain"))
    plain.add_chunks(DOCUMENT)
    for number, nearest in ((2, [DOCUMENT[1]]), (4, [DOCUMENT[0], DOCUMENT[2]])):
        wanted = by_hand(engine, DOCUMENT[number], [stored(plain, one) for one in nearest])
        assert_same(rotated(engine, stored(engine, DOCUMENT[number]), place(engine, nearest)), wanted)


@pytest.mark.parametrize(
    ("deleted", "gone"), [(0, [1, 4]), (1, [2]), (2, [4]), (3, [])], ids=["first", "second", "alone", "nobody's"]
)
def test_a_trace_goes_on_through_chained_caches_only(store: ChunkStore, deleted: int, gone: list[int]) -> None:
    engine = mixed_on(store)
    store.flush()
    engine.remove_chunks([engine.library.key_of(DOCUMENT[deleted])])
    there = [number for number in range(5) if found(engine, DOCUMENT[number]) is None]
    assert there == sorted([deleted, *gone])
    assert engine.identity.encoding == "previous:2+neighbours:2"


def test_what_comes_later_is_chained_to_what_stands_behind_neighbours(store: ChunkStore) -> None:
    """Its cache bears their trace, so it goes with them."""
    engine = mixed_on(store)
    later = CORPUS[5]
    engine.add_chunks([later], behind=[[DOCUMENT[4]]])
    keys = [engine.library.key_of(text) for text in DOCUMENT]
    assert set(stored(engine, later).behind.traces) == {keys[4], keys[0], keys[2]}
    store.flush()
    engine.remove_chunks([keys[2]])
    assert found(engine, later) is None
    assert found(engine, DOCUMENT[1]) is not None


@pytest.mark.parametrize("config", [PREVIOUS, NEIGHBOURS], ids=str)
def test_ratio_one_is_full_prefill_and_the_report_says_what_stood_before(config: ProphetKVConfig) -> None:
    engine = engine_on(MemoryStore(), config)
    engine.add_chunks(DOCUMENT, behind=NEAREST if config is NEIGHBOURS else None)
    prompt = Prompt("Context: ", DOCUMENT[:3], " Question: when?", glue="\n\n")
    result = engine.prefill(prompt, recompute_ratio=1.0)
    logits = engine.prefill(prompt, strategy="full_prefill").logits
    torch.testing.assert_close(result.logits, logits, rtol=0, atol=1e-5)
    wanted = [0, 1, 2] if config is PREVIOUS else [2, 2, 1]
    assert [chunk.behind for chunk in result.report.chunks] == wanted
    assert [chunk.status for chunk in result.report.chunks] == ["hit"] * 3


# ---- identity


def test_engines_of_different_encodings_share_nothing() -> None:
    configs = [ProphetKVConfig(encoding=name) for name in ("plain", "previous:1", "previous:2", "neighbours:2")]
    fingerprints = {engine_on(MemoryStore(), config).identity.fingerprint for config in configs}
    assert len(fingerprints) == 4
    assert engine_on(MemoryStore(), configs[2]).identity == engine_on(MemoryStore(), ProphetKVConfig()).identity


@pytest.mark.parametrize(
    "name",
    [
        *("", "nearest", "previous:", "previous:0", "previous:17", "plain:1", "neighbours:x", "previous:-1"),
        *("neighbours+previous", "previous+", "previous+neighbours+neighbours", "auto+neighbours", "previous+plain"),
    ],
)
def test_an_encoding_that_is_none(name: str) -> None:
    with pytest.raises(InputError, match="allowed: auto, plain, previous, neighbours"):
        ProphetKVConfig(encoding=name)


def test_behind_must_fit_the_chunks() -> None:
    with pytest.raises(InputError, match="behind has 1 entries for 5 chunks"):
        engine_on(MemoryStore(), NEIGHBOURS).add_chunks(DOCUMENT, behind=[[]])


def test_what_is_not_in_the_store_or_of_another_namespace_is_left_out(store: ChunkStore) -> None:
    other = engine_on(store, ProphetKVConfig(encoding="neighbours:2", namespace="other"))
    other.add_chunks([DOCUMENT[1]])
    engine = engine_on(store, NEIGHBOURS)
    engine.add_chunks([DOCUMENT[0], DOCUMENT[2]], behind=[[DOCUMENT[1], DOCUMENT[2]], [DOCUMENT[4], DOCUMENT[2]]])
    one, two = stored(engine, DOCUMENT[0]), stored(engine, DOCUMENT[2])
    assert one.behind.keys == (engine.library.key_of(DOCUMENT[2]),)
    assert two.behind.keys == ()  # neither what is not there, nor itself


def test_a_window_too_short_leaves_the_farthest_out(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_on(MemoryStore(), PREVIOUS)
    lengths = [len(engine.tokens.chunk(text)) for text in DOCUMENT[:3]]
    engine.library._encoder.context_window = len(engine.identity.prefix_ids) + lengths[1] + lengths[2]
    engine.add_chunks(DOCUMENT[:3])
    cache = stored(engine, DOCUMENT[2])
    assert cache.behind.keys == (engine.library.key_of(DOCUMENT[1]),)
    assert "the farthest are left out" in caplog.text


# ---- deletes


def deleted_keys(config: ProphetKVConfig, engine: ProphetKVEngine) -> tuple[str, list[str], list[str]]:
    """The text to delete, those whose caches must go with it, and those whose must not."""
    if config is PREVIOUS:  # its trace goes on down the document
        return DOCUMENT[2], DOCUMENT[3:], DOCUMENT[:2]
    return DOCUMENT[2], [DOCUMENT[0], DOCUMENT[4]], [DOCUMENT[1], DOCUMENT[3]]


@pytest.mark.parametrize("config", [PREVIOUS, NEIGHBOURS], ids=str)
def test_what_bears_a_deleted_chunks_trace_goes_with_it_and_is_computed_again(
    config: ProphetKVConfig, store: ChunkStore, tmp_path: Path
) -> None:
    engine = engine_on(store, config)
    engine.add_chunks(DOCUMENT, behind=NEAREST if config is NEIGHBOURS else None)
    gone, traced, clean = deleted_keys(config, engine)
    assert engine.remove_chunks([engine.library.key_of(gone)]) == [engine.library.key_of(gone)]
    store.flush()
    keys = {text: engine.library.key_of(text) for text in DOCUMENT}
    assert [keys[text] in store for text in traced] == [False] * len(traced)
    assert [keys[text] in store for text in clean] == [True] * len(clean)
    assert all(store.knows(keys[text]) for text in traced)
    files = {path.stem for path in tmp_path.rglob("*.safetensors")}
    assert files.isdisjoint(keys[text] for text in [gone, *traced])
    prompt = Prompt("", [traced[0], clean[0]], " Question: when?", glue="\n\n")
    report = engine.prefill(prompt).report
    assert [chunk.status for chunk in report.chunks] == ["miss", "hit"]
    assert report.chunks[0].behind == 0
    store.flush()
    assert [chunk.status for chunk in engine.prefill(prompt).report.chunks] == ["hit", "hit"]


@pytest.mark.parametrize("config", [PREVIOUS, NEIGHBOURS], ids=str)
def test_a_cache_in_another_process_ram_is_not_used_after_a_delete(config: ProphetKVConfig, tmp_path: Path) -> None:
    one, other = (engine_on(DiskStore(tmp_path), config) for _ in range(2))
    one.add_chunks(DOCUMENT, behind=NEAREST if config is NEIGHBOURS else None)
    gone, traced, _ = deleted_keys(config, one)
    prompt = Prompt("", [traced[0]], " Question: when?", glue="\n\n")
    for _ in range(2):  # from disk, then from its RAM
        assert other.prefill(prompt).report.chunks[0].status == "hit"
    one.remove_chunks([one.library.key_of(gone)])
    report = other.prefill(prompt).report
    assert (report.chunks[0].status, report.chunks[0].behind) == ("miss", 0)
    for engine in (one, other):
        engine.store.close()


def test_a_delete_while_a_dependant_is_encoded(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The neighbour goes between the model's run and the write: the cache with its trace is not kept."""
    engine = engine_on(store, NEIGHBOURS)
    engine.add_chunks(DOCUMENT[:3])
    put: Callable[..., None] = store.put
    key, gone = engine.library.key_of(DOCUMENT[0]), engine.library.key_of(DOCUMENT[1])

    def delete_first(name: str, cache: ChunkCache, **options: object) -> None:
        if name == key:
            other = threading.Thread(target=store.drop_references, args=("engine", [gone]))
            other.start()
            other.join()
        put(name, cache, **options)

    monkeypatch.setattr(store, "put", delete_first)
    engine.add_chunks([DOCUMENT[0]], behind=[[DOCUMENT[2], DOCUMENT[1]]])
    cache = found(engine, DOCUMENT[0])
    assert cache is None or gone not in cache.behind.traces


# ---- losses


@pytest.mark.parametrize("config", [PREVIOUS, NEIGHBOURS], ids=str)
def test_a_lost_cache_is_encoded_as_it_was(config: ProphetKVConfig, tmp_path: Path) -> None:
    engine = engine_on(DiskStore(tmp_path, ram_bytes=0), config)
    engine.add_chunks(DOCUMENT, behind=NEAREST if config is NEIGHBOURS else None)
    text = DOCUMENT[4]
    before = stored(engine, text)
    engine.store.files.path(engine.library.key_of(text)).unlink()
    report = engine.prefill(Prompt("", [text], " Question: when?", glue="\n\n")).report
    assert (report.chunks[0].status, report.chunks[0].behind) == ("miss", 2)
    engine.store.flush()
    again = stored(engine, text)
    assert again.behind == before.behind
    assert_same(list(zip(again.keys, again.values, strict=True)), list(zip(before.keys, before.values, strict=True)))
    engine.store.close()


@pytest.mark.parametrize("config", [PREVIOUS, NEIGHBOURS], ids=str)
def test_a_lost_cache_whose_neighbours_are_lost_too_is_encoded_plainly(config: ProphetKVConfig, tmp_path: Path) -> None:
    engine = engine_on(DiskStore(tmp_path, ram_bytes=0), config)
    engine.add_chunks(DOCUMENT, behind=NEAREST if config is NEIGHBOURS else None)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"")
    report = engine.prefill(Prompt("", [DOCUMENT[4]], " Question: when?", glue="\n\n")).report
    assert (report.chunks[0].status, report.chunks[0].behind) == ("corrupt", 0)
    engine.store.close()


@pytest.mark.parametrize("config", [PREVIOUS, NEIGHBOURS], ids=str)
def test_a_catalog_made_again_knows_what_stood_before(config: ProphetKVConfig, tmp_path: Path) -> None:
    engine = engine_on(DiskStore(tmp_path), config)
    engine.add_chunks(DOCUMENT, behind=NEAREST if config is NEIGHBOURS else None)
    gone, traced, clean = deleted_keys(config, engine)
    engine.store.close()
    (tmp_path / "catalog.sqlite").unlink()
    engine = engine_on(DiskStore(tmp_path), config)
    engine.remove_chunks([engine.library.key_of(gone)])
    assert not any(engine.library.key_of(text) in engine.store for text in traced)
    assert all(engine.library.key_of(text) in engine.store for text in clean)
    engine.store.close()


@pytest.mark.parametrize("first", [0, 2])
def test_a_first_chunk_is_exact_only_where_nothing_else_stood_before_it(first: int) -> None:
    """It follows the prefix that it was encoded behind, and, but for a document's first chunk, others stood between."""
    engine = engine_on(MemoryStore(), PREVIOUS)
    engine.add_chunks(DOCUMENT)
    opening = list(engine.identity.prefix_ids)
    prompt = Prompt(opening, [DOCUMENT[first], DOCUMENT[4]], "What is it?")
    start = len(opening)
    stop = start + len(engine.tokens.chunk(DOCUMENT[first]))
    picked = set(engine.prefill(prompt, strategy="epic:k=3", recompute_ratio=0.3).recomputed.tolist())
    assert (picked & set(range(start, stop))) == (set() if first == 0 else set(range(start, start + 3)))
    held_back = ProphetKVConfig(encoding="previous:2", first_chunk="cached", first_chunk_eligible=False)
    other = ProphetKVEngine(engine.model, engine.tokenizer, config=held_back, store=engine.store)
    picked = set(other.prefill(prompt, recompute_ratio=0.99).recomputed.tolist())
    assert bool(picked & set(range(start, stop))) == (first != 0)
