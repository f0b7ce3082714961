"""Caches of retrieved chunks begin to load when the collection answers, before the prompt is rendered."""

from __future__ import annotations

from contextlib import closing

import chromadb
import pytest

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.chroma import KVCachingCollection
from prophetkv_rag.prompt import Tokens
from prophetkv_rag.store.disk.store import DiskStore
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

MODEL = tiny_llama()
TEXTS = list(CORPUS[:3])


def opened(directory, **settings):
    """An engine over the directory as another process finds it: nothing is in RAM yet."""
    return ProphetKVEngine(MODEL, tiny_tokenizer(), store=DiskStore(directory, **settings))


@pytest.fixture
def collection(tmp_path):
    client = chromadb.EphemeralClient()
    raw = client.get_or_create_collection(f"ahead-{tmp_path.name}", embedding_function=None)
    engine = opened(tmp_path)
    vectors = [[float(i == j) for j in range(3)] for i in range(3)]
    KVCachingCollection(raw, engine).add(ids=["0", "1", "2"], documents=TEXTS, embeddings=vectors)
    engine.store.close()
    return raw


def ask(collection, engine, count=2):
    found = KVCachingCollection(collection, engine).query(
        query_embeddings=[[1.0, 0.5, 0.0]], n_results=count, include=["documents", "metadatas"]
    )
    engine.store.flush()
    return found["documents"][0]


def remove_blobs(directory):
    for blob in (directory / "blobs").rglob("*.safetensors"):
        blob.unlink()


def test_what_was_found_is_in_ram_when_the_prompt_comes(collection, tmp_path):
    engine = opened(tmp_path)
    texts = ask(collection, engine)
    assert texts == TEXTS[:2]
    assert engine.store.stats().hits == 0  # reading ahead is not a use
    remove_blobs(tmp_path)
    report = engine.prefill(Prompt("Read: ", texts, " So?")).report
    assert [chunk.status for chunk in report.chunks] == ["hit", "hit"]
    assert engine.prefill(Prompt("Read: ", TEXTS[2:], " So?")).report.chunks[0].status == "miss"


def test_what_was_found_first_is_in_ram_by_its_second_cache_too(collection, tmp_path):
    config = ProphetKVConfig(lead_in=CORPUS[5])

    def opened_so():
        return ProphetKVEngine(MODEL, tiny_tokenizer(), config=config, store=DiskStore(tmp_path / "led"))

    with closing(opened_so().store) as store:
        engine = ProphetKVEngine(MODEL, tiny_tokenizer(), config=config, store=store)
        KVCachingCollection(collection, engine).cache_existing()
        prompt = Prompt(Tokens(engine.tokenizer).default_encoding_prefix(), TEXTS[:2], " So?")
        assert [chunk.status for chunk in engine.prefill(prompt).report.chunks] == ["miss", "hit"]
    engine = opened_so()
    ask(collection, engine)
    remove_blobs(tmp_path / "led")
    assert [chunk.status for chunk in engine.prefill(prompt).report.chunks] == ["hit", "hit"]
    engine.store.close()


def test_without_a_query_nothing_is_read(collection, tmp_path):
    engine = opened(tmp_path)
    remove_blobs(tmp_path)
    report = engine.prefill(Prompt("Read: ", TEXTS[:2], " So?")).report
    assert {chunk.status for chunk in report.chunks} == {"miss"}


def test_a_bad_blob_is_left_to_the_query(collection, tmp_path):
    engine = opened(tmp_path)
    clean = engine.prefill(Prompt("Read: ", TEXTS[:2], " So?"))
    engine.store.close()
    for blob in (tmp_path / "blobs").rglob("*.safetensors"):
        blob.write_bytes(blob.read_bytes()[:-7])
    engine = opened(tmp_path)
    texts = ask(collection, engine)
    assert engine.store.stats().corrupt == 0
    result = engine.prefill(Prompt("Read: ", texts, " So?"))
    assert {chunk.status for chunk in result.report.chunks} == {"corrupt"}
    assert result.logits.equal(clean.logits) or (result.logits - clean.logits).abs().max() < 1e-4


def test_what_was_deleted_does_not_come_back(collection, tmp_path):
    engine = opened(tmp_path)
    proxy = KVCachingCollection(collection, engine)
    keys = engine.store.references(proxy.owner)
    assert len(keys) == 3
    proxy.delete(ids=["0", "1", "2"])
    engine.store.read_ahead(keys, fingerprint=engine.identity.fingerprint)
    engine.store.flush()
    assert engine.store._ram.nbytes == 0


def nearly_room_for_three(collection, tmp_path):
    """A store that holds any two of the caches in RAM, their keys, and the fingerprint."""
    engine = opened(tmp_path)
    keys = [engine.library.identity.key(engine.tokens.chunk(text)) for text in TEXTS]
    fingerprint = engine.identity.fingerprint
    sizes = [engine.store.find(key, fingerprint=fingerprint, input_ids=None).cache.nbytes for key in keys]
    engine.store.close()
    return DiskStore(tmp_path, ram_bytes=sum(sizes) - 1), keys, fingerprint


def test_what_a_prompt_has_in_ram_stays_when_the_rest_is_read(collection, tmp_path):
    store, (first, second, third), fingerprint = nearly_room_for_three(collection, tmp_path)
    with closing(store):
        for key in (first, second):
            store.find(key, fingerprint=fingerprint, input_ids=None)
        store.read_ahead([first, third], fingerprint=fingerprint).result()
        assert store.keys_in_ram() == {first, third}
        store.read_ahead([first, second, third], fingerprint=fingerprint).result()
        assert store.keys_in_ram() == {first, third}  # not all have room: what is there stays


def test_what_is_kept_is_dropped_last(collection, tmp_path):
    store, (first, second, third), fingerprint = nearly_room_for_three(collection, tmp_path)
    with closing(store):
        for key in (first, second):
            store.find(key, fingerprint=fingerprint, input_ids=None)
        store.keep_in_ram([first, third])
        store.find(third, fingerprint=fingerprint, input_ids=None)
        assert store.keys_in_ram() == {first, third}


def test_the_ram_tier_keeps_its_limit(collection, tmp_path):
    engine = opened(tmp_path)
    one = engine.store.get(
        engine.library.identity.key(engine.tokens.chunk(TEXTS[0])),
        fingerprint=engine.identity.fingerprint,
        input_ids=engine.tokens.chunk(TEXTS[0]),
    )[0]
    assert one is not None
    engine.store.close()
    engine = opened(tmp_path, ram_bytes=int(1.2 * one.nbytes))
    ask(collection, engine, count=3)
    assert 0 < engine.store._ram.nbytes <= 1.2 * one.nbytes
    engine = opened(tmp_path, ram_bytes=0)
    ask(collection, engine, count=3)
    assert engine.store._ram.nbytes == 0
