"""A cache never holds another dtype than its key says: not when it is stored, and not what is found under the key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVEngine, UnsupportedModelError
from prophetkv_rag.store.base import ChunkStore
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.memory import MemoryStore
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

CHUNKS = list(CORPUS[:3])
PROMPT = Prompt("Context: ", CHUNKS, " Question: when was it built?", glue="\n\n")


@pytest.fixture(params=["memory", "disk", "disk without a RAM tier", "packed"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    opened: ChunkStore = MemoryStore()
    if request.param != "memory":
        settings = {"blob_format": "int8"} if request.param == "packed" else {}
        opened = DiskStore(tmp_path / "store", ram_bytes=0 if "without" in request.param else 1 << 20, **settings)
        opened.files.keeps_packed = request.param == "packed"
    yield opened
    opened.close()


def engine_on(store: ChunkStore) -> ProphetKVEngine:
    return ProphetKVEngine(tiny_llama(), tiny_tokenizer(), store=store)


def test_caches_of_another_dtype_under_the_key_are_computed_again(store: ChunkStore) -> None:
    """As an engine under `torch.autocast` once wrote them, for good."""
    good = engine_on(MemoryStore())
    good.add_chunks(CHUNKS)
    engine = engine_on(store)
    fingerprint = engine.identity.fingerprint
    keys = [engine.identity.key(chunk.input_ids) for chunk in good.read(PROMPT).chunks]
    for chunk in good.read(PROMPT).chunks:
        cache, _ = good.store.get(chunk.key, fingerprint=fingerprint, input_ids=chunk.input_ids)
        assert cache is not None
        rounded = cache.mapped(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
        store.put(chunk.key, rounded, fingerprint=fingerprint)
    engine.add_chunks(CHUNKS)

    result = engine.prefill(PROMPT)
    assert [chunk.status for chunk in result.report.chunks] == ["corrupt"] * 3
    assert result.past_key_values.layers[0].keys.dtype == torch.float32
    assert store.stats().corrupt == 3
    store.flush()
    again = engine.prefill(PROMPT)
    assert [chunk.status for chunk in again.report.chunks] == ["hit"] * 3
    for key, chunk in zip(keys, good.read(PROMPT).chunks, strict=True):
        cache, _ = store.get(key, fingerprint=fingerprint, input_ids=chunk.input_ids)
        assert cache is not None
        assert cache.is_of("float32")
    assert store.references("engine")


def test_no_cache_of_another_dtype_is_stored(store: ChunkStore) -> None:
    engine = engine_on(store)
    for layer in engine.model.model.layers:  # what a caller's hook may do after the engine was made
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, output: output.double())
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: output.double())
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: output.double())
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: tuple(x.float() for x in args))
    calls: list[Any] = [lambda: engine.add_chunks(CHUNKS), lambda: engine.prefill(PROMPT)]
    engine.library.register(CHUNKS[0], owner="somebody")
    for call in calls:
        with pytest.raises(UnsupportedModelError, match=r"float64 now, and gave float32.*Make a new engine"):
            call()
    store.flush()
    assert all(key not in store for key in store.references("engine"))
