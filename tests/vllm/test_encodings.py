"""Chunks of a document behind those before them, and second caches of first chunks: as our engine has them."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import save_tiny, text_of
from tests.vllm.serving import Served, reuse, tokens
from tests.vllm.test_models import SHAPE

DOCUMENT = [text_of(70, seed=seed) for seed in range(5)]
ALONE = text_of(70, seed=20)
ORDERS = ((2, 0, 4, 1), (0, 3, 2, 1), (4, 3, 1, 0))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = save_tiny(tmp_path_factory.mktemp("model"), **SHAPE)
    served = Served(model, tmp_path_factory.mktemp("caches"), block_size=32, extra={"max_stage_tokens": 500})
    served.register([ALONE])
    served.register(DOCUMENT, in_order=True)
    yield served
    served.close()


def prompts(first="", *, question=0):
    """Prompts whose chunks stand right behind the opening, or behind something else."""
    found = []
    for number, order in enumerate(ORDERS):
        chunks = [*(DOCUMENT[i] for i in order), ALONE]
        text = first + "\n\n".join(chunks) + f"\n\n{text_of(8, seed=100 + 10 * question + number)}"
        found.append([{"role": "user", "content": text}])
    return found


def stored(served, key):
    return served.planner._store.find(key, fingerprint=served.planner._identity.fingerprint, input_ids=None).cache


def key_of(served, text):
    return served.planner._identity.key(served.engine.library.tokens.chunk(text))


def test_caches_are_the_engine_s_and_bear_the_same_traces(served):
    engine = served.engine
    ours = {key_of(served, text): engine.key_of(text) for text in DOCUMENT}
    for number, text in enumerate(DOCUMENT):
        cache = stored(served, key_of(served, text))
        expected = engine.store.find(engine.key_of(text), fingerprint=engine.identity.fingerprint, input_ids=None).cache
        assert len(expected.behind.keys) == min(number, 2)
        for name in ("keys", "through"):
            assert [ours[key] for key in getattr(cache.behind, name)] == list(getattr(expected.behind, name))
        assert cache.behind.is_chained == (number > 0)
        for one, other in zip((*cache.keys, *cache.values), (*expected.keys, *expected.values), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["", "Read this.\n\n"])
@pytest.mark.parametrize("ratio", [None, 0.0, 0.25])
def test_answers_selections_and_reports_are_the_engine_s(served, first, ratio):
    served.forget_prefixes()
    asked = prompts(first)
    with served.selections() as selected:
        outputs = served.run([served.ids(one) for one in asked], [{"recompute_ratio": ratio}] * len(asked))
    settings = {} if ratio is None else {"recompute_ratio": ratio}
    assert [tokens(output) for output in outputs] == [served.engine_answer(one, **settings) for one in asked]
    ours = [served.engine.prefill(one, **settings) for one in asked]
    assert sorted(selected, key=sorted) == sorted((set(one.recomputed.tolist()) for one in ours), key=sorted)
    for output, one in zip(outputs, ours, strict=True):
        said = reuse(output)
        assert said["recompute_ratio"] == pytest.approx(one.report.recompute_ratio)
        assert (said["reused_tokens"], said["recomputed_tokens"]) == (
            one.report.reused_tokens,
            one.report.recomputed_tokens,
        )
        assert [chunk["behind"] for chunk in said["chunks"]] == [chunk.behind for chunk in one.report.chunks]
    if ratio is None:
        assert all(said["recompute_ratio"] < 0.12 for said in map(reuse, outputs)) == (not first)
