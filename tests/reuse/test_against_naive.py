"""Stage I, stage II and plain reuse against the naive float64 implementation, which shares no code with the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.reuse.assemble import assemble_caches
from prophetkv_rag.reuse.selection import Selection, Strategy, make_strategy
from tests.reuse.naive.prompt_reference import context_positions, select
from tests.reuse.naive.transformers_oracle import naive_of, tiny_llama

TOLERANCE = 2e-4
ENCODING_PREFIX = (7, 3, 9, 1)
RATIOS = (0.1, 0.2, 0.5)


def draw(count, seed):
    return np.random.default_rng(seed).integers(0, 90, count).tolist()


PREFIX, GLUE, SUFFIX, QUERY = draw(6, 0), draw(2, 1), draw(7, 2), draw(4, 3)
CHUNKS = [draw(9, 4), draw(11, 5), draw(8, 6)]
SEGMENTS = [
    (PREFIX, False), (CHUNKS[0], True), (GLUE, False), (CHUNKS[1], True), (GLUE, False), (CHUNKS[2], True),
    (SUFFIX, False),
]  # fmt: skip


class Spy(Strategy):
    """Selects what it is told and keeps the scores that the engine computed."""

    name = "spy"

    def __init__(self, positions=(), **scoring):
        self.positions, self.scoring, self.scores = positions, scoring, None

    def select(self, context):
        self.scores = context.attention_scores(**self.scoring)
        return Selection(torch.tensor(list(self.positions), dtype=torch.int64))


class Chosen(Strategy):
    """Keeps what another strategy selects."""

    name = "chosen"

    def __init__(self, strategy):
        self.strategy, self.selection = strategy, None

    def select(self, context):
        self.selection = self.strategy.select(context)
        return self.selection


@pytest.fixture(scope="module", params=["gqa", "llama3", "yarn"])
def pair(request):
    model = tiny_llama(request.param).float()
    naive = naive_of(model)
    engine = ProphetKVEngine(model, None, config=ProphetKVConfig(encoding_prefix=ENCODING_PREFIX))
    engine.add_chunks(CHUNKS)
    caches = [naive.encode_chunk(ENCODING_PREFIX, chunk) for chunk in CHUNKS]
    return engine, naive, caches


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual, dtype=np.float64), expected, atol=TOLERANCE, rtol=TOLERANCE)


def assert_cache(result, keys, values):
    for layer, own_keys, own_values in zip(result.past_key_values.layers, keys, values, strict=True):
        close(layer.keys[0], own_keys)
        close(layer.values[0], own_values)


def prompt(query=None):
    return Prompt(PREFIX, CHUNKS, SUFFIX, glue=GLUE, query=query)


def test_chunks_are_encoded_unrotated(pair):
    engine, _, caches = pair
    for chunk, (keys, values) in zip(CHUNKS, caches, strict=True):
        cache, _ = engine.store.get(
            engine.identity.key(chunk), fingerprint=engine.identity.fingerprint, input_ids=chunk
        )
        for layer in range(len(keys)):
            close(cache.keys[layer], keys[layer])
            close(cache.values[layer], values[layer])


def test_assembled_keys(pair):
    engine, naive, caches = pair
    stored = [
        engine.store.get(engine.identity.key(c), fingerprint=engine.identity.fingerprint, input_ids=c)[0]
        for c in CHUNKS
    ]
    rows = context_positions(SEGMENTS)
    starts = [len(PREFIX), len(PREFIX) + 9 + 2, len(PREFIX) + 9 + 2 + 11 + 2]
    total = sum(len(ids) for ids, _ in SEGMENTS)
    layers = assemble_caches(engine.support, stored, starts, total, dtype=torch.float32, device=torch.device("cpu"))
    expected_keys, expected_values = naive.assemble(SEGMENTS, caches)
    for layer, keys, values in zip(layers, expected_keys, expected_values, strict=True):
        close(layer.keys[0][:, rows], keys[:, rows])
        close(layer.values[0][:, rows], values[:, rows])


def test_plain_reuse(pair):
    engine, naive, caches = pair
    result = engine.prefill(prompt(), recompute_ratio=0.0)
    logits, keys, values = naive.plain_reuse(SEGMENTS, caches)
    close(result.logits[0], logits)
    assert_cache(result, keys, values)


@pytest.mark.parametrize("softmax", ["context", "full_row"])
def test_stage_one_scores_of_the_suffix(pair, softmax):
    engine, naive, caches = pair
    spy = Spy(score_softmax=softmax, query_scope="suffix")
    engine.prefill(prompt(), strategy=spy)
    expected = naive.stage_one_scores(SEGMENTS, caches, softmax=softmax)
    rows = context_positions(SEGMENTS)
    close(spy.scores[rows], expected)
    assert float(spy.scores.sum()) == pytest.approx(float(expected.sum()), rel=1e-4)  # nothing outside the context


@pytest.mark.parametrize("softmax", ["context", "full_row"])
def test_stage_one_scores_of_a_question_inside_the_suffix(pair, softmax):
    engine, naive, caches = pair
    spy = Spy(score_softmax=softmax, query_scope="question")
    engine.prefill(prompt(query=SUFFIX[2:5]), strategy=spy)
    expected = naive.stage_one_scores(SEGMENTS, caches, scoring_rows=[2, 3, 4], softmax=softmax)
    close(spy.scores[context_positions(SEGMENTS)], expected)


@pytest.mark.parametrize("start", [0, 0.3, 0.5, 0.99])
def test_stage_one_scores_of_the_later_layers(pair, start):
    engine, naive, caches = pair
    num_layers = len(caches[0][0])
    first_layer = next(layer for layer in range(num_layers) if layer + 1 > start * num_layers)
    expected = naive.stage_one_scores(SEGMENTS, caches, first_layer=first_layer)
    rows = context_positions(SEGMENTS)
    spy = Spy(first_layer=first_layer)
    engine.prefill(prompt(), strategy=spy)
    close(spy.scores[rows], expected)

    chosen = Chosen(make_strategy(f"prophetkv_late:start={start}"))
    engine.prefill(prompt(), strategy=chosen, recompute_ratio=0.3)
    best = np.argsort(-expected, kind="stable")[: len(rows) * 3 // 10]
    assert chosen.selection.positions.tolist() == sorted(rows[index] for index in best)


@pytest.mark.parametrize("softmax", ["context", "full_row"])
def test_stage_one_scores_of_a_question_that_stands_elsewhere(pair, softmax):
    engine, naive, caches = pair
    spy = Spy(score_softmax=softmax)
    engine.prefill(prompt(query=QUERY), strategy=spy)
    expected = naive.stage_one_scores(SEGMENTS, caches, softmax=softmax, extra_query_ids=QUERY)
    close(spy.scores[context_positions(SEGMENTS)], expected)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("query", [None, QUERY])
def test_the_whole_method(pair, ratio, query):
    """Scores, selection and recomputation together: same tokens chosen, same K, V and logits."""
    engine, naive, caches = pair
    result = engine.prefill(prompt(query=query), recompute_ratio=ratio)
    scores = naive.stage_one_scores(SEGMENTS, caches, extra_query_ids=query)
    chosen = select(scores, ratio, positions=context_positions(SEGMENTS))
    assert result.report.recomputed_tokens == len(chosen)
    logits, keys, values = naive.recompute(SEGMENTS, caches, chosen)
    close(result.logits[0], logits)
    assert_cache(result, keys, values)


def test_recompute_of_any_rows(pair):
    engine, naive, caches = pair
    chosen = context_positions(SEGMENTS)[1::4]
    result = engine.prefill(prompt(), strategy=Spy(positions=chosen))
    logits, keys, values = naive.recompute(SEGMENTS, caches, chosen)
    close(result.logits[0], logits)
    assert_cache(result, keys, values)
