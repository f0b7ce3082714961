"""InfoFlow KV, FusionRAG and QCFuse: what they pick and compute, against the naive float64 one and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.kernels import ops
from prophetkv_rag.model import AttentionCall, NormScoringPass
from prophetkv_rag.reuse.selection import make_strategy
from tests import families
from tests.reuse import test_against_naive as base
from tests.reuse.naive.prompt_reference import best_others, context_positions, select
from tests.tiny import tiny_llama

pair = base.pair  # the engine, the naive model and its chunk caches
ROWS = context_positions(base.SEGMENTS)
LAST = {"infoflow": (2, "norm"), "fusionrag": (1, "mean"), "qcfuse": (2, "mean")}
"""How many of the naive model's three layers count; the middle is behind the first of them."""


def naive_scores(naive, caches, name, **scoring):
    counted, over_rows = LAST[name]
    first_layer = len(caches[0][0]) - counted
    return naive.stage_one_scores(
        base.SEGMENTS, caches, softmax="full_row", first_layer=first_layer, over_rows=over_rows, **scoring
    )


@pytest.mark.parametrize("name", LAST)
@pytest.mark.parametrize("ratio", [0.1, 0.4])
@pytest.mark.parametrize("asking", ["suffix", "question", "elsewhere"])
def test_against_naive(pair, name, ratio, asking):
    engine, naive, caches = pair
    query, scoring = None, {}
    if asking == "question":
        query, scoring = base.SUFFIX[2:5], {"scoring_rows": [2, 3, 4]}
    elif asking == "elsewhere":
        query, scoring = base.QUERY, {"extra_query_ids": base.QUERY}
    asked = ProphetKVEngine(
        engine.model,
        None,
        config=ProphetKVConfig(encoding_prefix=base.ENCODING_PREFIX, query_scope="question"),
        store=engine.store,
    )
    strategy = base.Chosen(make_strategy(name))
    found = asked.prefill(base.prompt(query=query), strategy=strategy, recompute_ratio=ratio)
    scores = naive_scores(naive, caches, name, **scoring)
    chosen = select(scores, ratio, positions=ROWS)
    assert strategy.selection.positions.tolist() == found.recomputed.tolist() == chosen
    logits, keys, values = naive.recompute(base.SEGMENTS, caches, chosen)
    base.close(found.logits[0], logits)
    base.assert_cache(found, keys, values)


@pytest.mark.parametrize("name", LAST)
def test_scores(pair, name):
    """Not only their order; and they take a share of the context as `prophetkv` does."""
    engine, naive, caches = pair
    counted, over_rows = LAST[name]
    first_layer = len(caches[0][0]) - counted
    spy = base.Spy(score_softmax="full_row", first_layer=first_layer, over_rows=over_rows)
    engine.prefill(base.prompt(), strategy=spy)
    expected = naive_scores(naive, caches, name)
    summed = counted if over_rows == "norm" else 1  # the naive one averages norms over layers, and sums means
    base.close(spy.scores[ROWS] / summed, expected)
    assert float(spy.scores.sum()) == pytest.approx(summed * float(expected.sum()), rel=1e-4)

    chosen = select(expected, 0.2, positions=ROWS)
    others = best_others(expected, 0.5, chosen, ROWS)
    found = engine.prefill(base.prompt(), strategy=f"{name}:context_share=0.5", recompute_ratio=0.2)
    logits, keys, values = naive.recompute(base.SEGMENTS, caches, chosen, others=others)
    base.close(found.logits[0], logits)
    base.assert_cache(found, keys, values)


@pytest.mark.parametrize("name", LAST)
def test_the_charge_is_prophetkvs(pair, name):
    """All layers of stage I run for them, so all are charged; nothing runs where the ratio leaves no choice."""
    engine, _, _ = pair
    for ratio in (0.0, 0.3, 1.0):
        reports = [
            engine.prefill(base.prompt(), strategy=one, recompute_ratio=ratio).report for one in (name, "prophetkv")
        ]
        assert reports[0].row_layers == reports[1].row_layers
        assert reports[0].charged_ratio == reports[1].charged_ratio


def test_qcfuse_ends_behind_its_three_layers():
    """Of nine layers the fifth to the seventh count; behind them stage I runs one row."""
    engine = ProphetKVEngine(tiny_llama(num_hidden_layers=9), None, config=ProphetKVConfig(encoding_prefix=(3, 1)))
    prompt = base.Prompt([3, 1], [list(range(10, 30)), list(range(40, 57))], [7, 8, 9])
    layers = [base.Spy(score_softmax="full_row", first_layer=number) for number in range(9)]
    for spy in layers:
        engine.prefill(prompt, strategy=spy)
    strategy = base.Chosen(make_strategy("qcfuse"))
    report = engine.prefill(prompt, strategy=strategy, recompute_ratio=0.2).report
    counted = layers[4].scores - layers[7].scores
    assert strategy.selection.positions.tolist() == sorted(counted.topk(7).indices.tolist())
    assert report.row_layers == 3 * 7 + 2 + (7 + 3) * 9


def test_a_norm_by_hand():
    """Two heads, three keys, of which the last two are context; rows at 1 and 2 ask. Logits are written down."""
    layers = families_layers(2)
    query = torch.tensor([[[[0.0], [1.0], [1.0]], [[0.0], [0.0], [2.0]]]])  # [1, H, m, D]
    key = torch.tensor([0.0, 1.0, 2.0]).log().clamp_min(-80.0)[None, None, :, None]  # e^(k q): 0, 1, 2
    value = torch.zeros(1, 1, 3, 1)
    scoring = NormScoringPass(
        layers,
        torch.arange(3),
        context=torch.tensor([False, True, True]),
        scoring_rows=torch.tensor([False, True, True]),
        context_softmax=False,
    )
    for layer in range(2):
        scoring.attend(AttentionCall(layer, query, key, value, 1.0, None, None, None, None, {}))
    # Row 1 sees keys 0 and 1: head 0 gives them 0 and 1, head 1 (query 0) a half each.
    # Row 2: head 0 gives 0, 1/3, 2/3; head 1 (query 2) gives 0, 1/5, 4/5.
    first = np.hypot((1 + 1 / 2) / 2, (1 / 3 + 1 / 5) / 2)
    second = (2 / 3 + 4 / 5) / 2
    np.testing.assert_allclose(scoring.scores, [0.0, 2 * first, 2 * second], atol=1e-6)


def families_layers(count):
    """What the probe finds of a tiny model's layers, as many as are asked for."""
    engine = ProphetKVEngine(families.SUPPORTED["llama"](), None, config=ProphetKVConfig(encoding_prefix=(3,)))
    return engine.support.layers[:count]


def test_a_norm_goes_with_the_full_row(pair):
    engine, _, _ = pair
    with pytest.raises(ValueError, match="over_rows='norm' needs 'full_row'"):
        engine.prefill(base.prompt(), strategy=base.Spy(score_softmax="context", over_rows="norm"))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_windows_soft_caps_and_sinks(name):
    """One asking row: its norm is its mean, whatever the attention is made of."""
    engine = ProphetKVEngine(families.SUPPORTED[name](), None, config=ProphetKVConfig(encoding_prefix=(3, 1, 4)))
    prompt = base.Prompt([3, 1, 4], [list(range(10, 30)), list(range(40, 57))], [7], glue=[5])
    found = []
    for over_rows in ("mean", "norm"):
        spy = base.Spy(score_softmax="full_row", first_layer=1, over_rows=over_rows)
        with ops.force("reference"):
            engine.prefill(prompt, strategy=spy)
        found.append(spy.scores)
    assert float(found[0].abs().max()) > 1e-2
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)
