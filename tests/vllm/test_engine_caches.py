"""Caches that our engine made with transformers serve inside vLLM, where `model_fingerprint` says that they may."""

from __future__ import annotations

import pytest

from prophetkv_rag import ProphetKVEngine
from prophetkv_rag.store.disk import open_disk_store
from tests.tiny import save_tiny, text_of
from tests.vllm.serving import AS_IN_VLLM, Served, reuse, tokens
from tests.vllm.test_encodings import DOCUMENT, prompts
from tests.vllm.test_models import SHAPE


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    model = save_tiny(directory / "model", **SHAPE)
    store = open_disk_store(directory / "caches", ram_bytes=0)
    engine = ProphetKVEngine.from_pretrained(model, config=AS_IN_VLLM, store=store)
    texts = [*DOCUMENT, text_of(70, seed=20)]
    engine.add_chunks(texts, behind=[texts[:number] for number in range(len(texts))])
    store.close()
    extra = {"model_fingerprint": engine.identity.model, "may_register": False}
    served = Served(model, directory / "caches", block_size=32, extra=extra)
    served.engine.add_chunks(texts, behind=[texts[:number] for number in range(len(texts))])
    assert served.planner._identity.fingerprint == engine.identity.fingerprint
    yield served
    served.close()


@pytest.mark.parametrize("ratio", [None, 0.0, 0.25])
def test_answers_and_selections_are_the_engine_s(served, ratio):
    served.forget_prefixes()
    asked = prompts()
    with served.selections() as selected:
        outputs = served.run([served.ids(one) for one in asked], [{"recompute_ratio": ratio}] * len(asked))
    settings = {} if ratio is None else {"recompute_ratio": ratio}
    assert [reuse(output)["status"] for output in outputs] == ["reused"] * len(asked)
    assert all(chunk["status"] == "hit" for output in outputs for chunk in reuse(output)["chunks"][1:])
    assert [tokens(output) for output in outputs] == [served.engine_answer(one, **settings) for one in asked]
    ours = [served.engine.prefill(one, **settings) for one in asked]
    assert sorted(selected, key=sorted) == sorted((set(one.recomputed.tolist()) for one in ours), key=sorted)
