"""What a worker takes from its store: no cache with the trace of what is deleted, and none of a former version."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from prophetkv_rag.integrations.vllm.identity import opening_of
from prophetkv_rag.integrations.vllm.messages import LoadPlan
from prophetkv_rag.integrations.vllm.rank_caches import RankCaches
from prophetkv_rag.prompt import TokenMatch
from prophetkv_rag.store import ALONE, Behind, CacheIdentity, ChunkCache
from prophetkv_rag.store.disk import open_disk_store

IDENTITY = CacheIdentity("m", "t", (1,), "float32", "", "previous:2")
IDS = {name: tuple(range(number, number + 20)) for number, name in enumerate("AB")}
KEYS = {name: IDENTITY.key(ids) for name, ids in IDS.items()}
ONE_RANK = SimpleNamespace(num_ranks=1, rank=0, all_same=lambda values: [bool(value) for value in values])


def cache_of(name, behind=ALONE, value=0.0):
    rows = torch.full((2, 20, 8), value)
    return ChunkCache(torch.tensor(IDS[name], dtype=torch.int32), (rows,), (rows + 1,), behind)


@pytest.fixture
def stores(tmp_path):
    found = [open_disk_store(tmp_path, ram_bytes=1 << 20) for _ in range(2)]
    yield found
    for store in found:
        store.close()


def load(caches, behind=()):
    match = TokenMatch(KEYS["B"], 0, 20, 0)
    plan = LoadPlan("r", IDS["B"], (match,), (behind,), "", "opening", 0.2, (), (), 0)
    return caches.load([plan], IDENTITY, opening_of(IDENTITY))


def test_a_trace_of_what_another_process_deleted(stores):
    own, other = stores
    other.put(KEYS["A"], cache_of("A"), fingerprint=IDENTITY.fingerprint)
    other.put(KEYS["B"], cache_of("B", Behind((KEYS["A"],), (), True)), fingerprint=IDENTITY.fingerprint)
    caches = RankCaches(own, ONE_RANK, 2)
    assert caches.find(KEYS["B"], fingerprint=IDENTITY.fingerprint, input_ids=None).cache is not None
    assert load(caches, (KEYS["A"],))[1] == []
    other.delete([KEYS["A"]])
    assert own.find(KEYS["B"], fingerprint=IDENTITY.fingerprint, input_ids=None).cache is not None  # still in RAM
    assert load(caches, (KEYS["A"],)) == ([None], [KEYS["B"]])
    assert caches.find(KEYS["B"], fingerprint=IDENTITY.fingerprint, input_ids=None).cache is None


def test_a_cache_that_was_replaced(stores):
    own, other = stores
    for name in "AB":
        other.put(KEYS[name], cache_of(name), fingerprint=IDENTITY.fingerprint)
    caches = RankCaches(own, ONE_RANK, 2)
    assert load(caches)[1] == []
    other.put(KEYS["B"], cache_of("B", Behind((KEYS["A"],), (), True), value=1.0), fingerprint=IDENTITY.fingerprint)
    (((cache,),), lost) = load(caches, (KEYS["A"],))
    assert (lost, float(cache.keys[0][0, 0, 0])) == ([], 1.0)
    assert load(caches) == (
        [None],
        [],
    )  # planned before it was replaced: vLLM prefills the prompt; nothing is lost
