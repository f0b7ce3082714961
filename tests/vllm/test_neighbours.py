"""A Chroma collection whose chunks vLLM's workers encode, behind neighbours too: its caches are those of our engine."""

from __future__ import annotations

from dataclasses import replace

import chromadb
import pytest
import torch

from prophetkv_rag import ProphetKVEngine
from prophetkv_rag.chroma import KVCachingCollection
from prophetkv_rag.integrations.vllm.identity import opening_of
from prophetkv_rag.integrations.vllm.served_chunks import ServedChunks
from prophetkv_rag.store.disk import open_disk_store
from tests.tiny import save_tiny, text_of
from tests.vllm.serving import AS_IN_VLLM, Served, reuse, tokens
from tests.vllm.test_models import SHAPE

ENCODING = "previous:2+neighbours:3"
SINGLE = [text_of(40 + seed, seed=seed) for seed in range(7)]
DOCUMENT = [text_of(50, seed=20 + seed) for seed in range(3)]


class InVLLM:
    """What `VLLMEngine` is for a collection, on a vLLM in this process."""

    def __init__(self, served, directory):
        self.store = open_disk_store(directory, ram_bytes=0)
        self.identity = served.planner._identity
        self.library = ServedChunks(
            "tiny",
            served.engine.tokens,
            self.store,
            self.identity,
            served.planner._settings.placed,
            served.llm.model_config,
            most_tokens=500,
            register=lambda said: reuse(served.run([[1]], [said], max_tokens=1)[0]),
        )
        self.add_chunks, self.remove_chunks = self.library.add, self.library.remove

    def cache(self, text):
        key = self.library.key_of(text)
        return self.store.find(key, fingerprint=self.identity.fingerprint, input_ids=None).cache


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = save_tiny(tmp_path_factory.mktemp("model"), **SHAPE)
    directory = tmp_path_factory.mktemp("caches")
    served = Served(model, directory, block_size=32, extra={"encoding": ENCODING, "max_stage_tokens": 400})
    yield served
    served.close()


@pytest.fixture(scope="module")
def engines(served):
    """vLLM's, and ours on the same weights."""
    config = replace(AS_IN_VLLM, encoding=ENCODING)
    ours = ProphetKVEngine(served.engine.model, served.engine.tokenizer, config=config)
    in_vllm = InVLLM(served, served.directory)
    yield in_vllm, ours
    in_vllm.store.close()


@pytest.fixture(scope="module")
def collections(engines):
    """One in Chroma for each engine, with the same records."""
    found = []
    for number, engine in enumerate(engines):
        plain = chromadb.EphemeralClient().create_collection(f"texts-{number}", embedding_function=None)
        collection = KVCachingCollection(plain, engine, in_background=False)
        for texts, source in ((SINGLE, None), (DOCUMENT, "book")):
            names = [f"{source}{number}" for number in range(len(texts))]
            sources = [{"source": source or name} for name in names]
            collection.add(ids=names, documents=texts, metadatas=sources, embeddings=[place_of(text) for text in texts])
        collection.encode_behind_neighbours()
        found.append(collection)
    return found


def place_of(text):
    angle = torch.tensor((SINGLE + DOCUMENT).index(text) ** 1.5 / 6 if text in SINGLE + DOCUMENT else 0.2)
    return [float(angle.cos()), float(angle.sin())]


def assert_same_caches(engines, texts):
    in_vllm, ours = engines
    keys = {in_vllm.library.key_of(text): ours.key_of(text) for text in texts}
    for text in texts:
        cache = in_vllm.cache(text)
        expected = ours.store.find(ours.key_of(text), fingerprint=ours.identity.fingerprint, input_ids=None).cache
        for name in ("keys", "through"):
            assert [keys[key] for key in getattr(cache.behind, name)] == list(getattr(expected.behind, name))
        assert not cache.behind.keys or cache.behind.is_chained == expected.behind.is_chained
        for one, other in zip((*cache.keys, *cache.values), (*expected.keys, *expected.values), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_caches_are_those_of_our_engine(engines, collections):
    in_vllm, _ = engines
    assert [len(in_vllm.cache(text).behind.keys) for text in SINGLE + DOCUMENT] == [3] * len(SINGLE) + [0, 1, 2]
    assert_same_caches(engines, SINGLE + DOCUMENT)


def test_prompts_find_them_and_one_that_is_lost_is_encoded_as_it_was(served, engines, collections):
    in_vllm, ours = engines
    chunks = [SINGLE[4], SINGLE[1], DOCUMENT[2], SINGLE[6]]
    prompt = [{"role": "user", "content": "\n\n".join(chunks) + f"\n\n{text_of(8, seed=70)}"}]
    lost = in_vllm.cache(SINGLE[1])
    in_vllm.store.files.path(in_vllm.library.key_of(SINGLE[1])).unlink()
    (output,) = served.run([ours.read(prompt).input_ids.tolist()], [{}])
    said = reuse(output)
    assert [chunk["status"] for chunk in said["chunks"]] == ["miss", "miss", "hit", "hit"]
    assert [chunk["behind"] for chunk in said["chunks"]] == [0, 3, 2, 3]
    again = in_vllm.cache(SINGLE[1])
    assert again.behind == lost.behind
    for one, other in zip((*again.keys, *again.values), (*lost.keys, *lost.values), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    result = ours.prefill(prompt)
    answer = ours.model.generate(
        **result.inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert tokens(output) == answer[0, result.input_ids.shape[1] :].tolist()


def test_a_document_of_several_requests_in_any_order(engines):
    in_vllm, _ = engines
    texts = [text_of(12, seed=200 + number) for number in range(20)]
    behind = [texts[max(0, number - 2) : number] for number in range(len(texts))]
    in_vllm.library.add(texts[::-1], owner="long", behind=behind[::-1])
    assert [len(in_vllm.cache(text).behind.keys) for text in texts] == [0, 1] + [2] * 18


def test_second_caches_are_computed_when_they_are_asked_for(engines, collections):
    in_vllm, _ = engines
    opening, done = opening_of(in_vllm.identity), []
    texts = [SINGLE[0], SINGLE[2], DOCUMENT[0]]  # of which the last one stands behind nothing else anyway
    assert in_vllm.library.add_second(texts, progress=lambda *now: done.append(now)) == 2
    assert done == [(1, 2), (2, 2)]
    keys = [opening.key(in_vllm.library.tokens.chunk(text)) for text in texts]
    assert [key in in_vllm.store for key in keys] == [True, True, False]
    assert in_vllm.library.add_second(texts) == 0


def test_refreshed_and_deleted_neighbours(engines, collections):
    in_vllm, _ = engines
    new = [text_of(45, seed=80 + number) for number in range(4)]
    key = in_vllm.library.key_of
    near = SINGLE[2]
    before = in_vllm.cache(near).behind.keys
    for collection in collections:
        where = [[value + 0.001 * number for value in place_of(near)] for number in range(4)]
        collection.add(ids=[f"new{number}" for number in range(4)], documents=new, embeddings=where)
        collection.encode_behind_neighbours()
    assert in_vllm.cache(near).behind.keys == before
    for collection in collections:
        collection.encode_behind_neighbours(refresh=True)
    assert set(in_vllm.cache(near).behind.keys) < set(map(key, new))
    assert_same_caches(engines, [*SINGLE, *DOCUMENT, *new])
    for collection in collections:
        collection.delete(ids=[f"new{number}" for number in range(4)])
    assert in_vllm.cache(near) is None  # it bore their trace
    for collection in collections:
        collection.cache_existing()
        collection.encode_behind_neighbours()
    assert_same_caches(engines, SINGLE + DOCUMENT)
    assert not in_vllm.store.known([key(text) for text in new])
