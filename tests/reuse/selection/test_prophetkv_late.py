"""`prophetkv_late` with layers that do not count at the end: stage I stops there. Against the naive implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prophetkv_rag import InputError, Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.reuse.selection import make_strategy
from tests import families
from tests.reuse import test_against_naive as base
from tests.reuse.naive.prompt_reference import context_positions, select

pair = base.pair  # the engine, the naive model (3 layers) and its chunk caches
ROWS = context_positions(base.SEGMENTS)
LAYERS = {"start=0,stop=0.6": (0, 1), "start=0.4,stop=0.5": (1, 1), "start=0,stop=0.1": (0, 0)}


@pytest.mark.parametrize("spec", LAYERS)
@pytest.mark.parametrize("query", [None, base.QUERY])
def test_the_whole_method(pair, spec, query):
    """The prompt's prefix is not the encoding prefix here: its later layers are computed in stage II."""
    engine, naive, caches = pair
    first, last = LAYERS[spec]
    scores = naive.stage_one_scores(base.SEGMENTS, caches, first_layer=first, last_layer=last, extra_query_ids=query)
    chosen = select(scores, 0.3, positions=ROWS)
    spy = base.Spy(chosen, first_layer=first, last_layer=last)
    engine.prefill(base.prompt(query=query), strategy=spy)
    base.close(spy.scores[ROWS], scores)
    found = engine.prefill(base.prompt(query=query), strategy=f"prophetkv_late:{spec}", recompute_ratio=0.3)
    assert found.recomputed.tolist() == chosen
    logits, keys, values = naive.recompute(base.SEGMENTS, caches, chosen)
    base.close(found.logits[0], logits)
    base.assert_cache(found, keys, values)


@pytest.mark.parametrize("prefix", [base.ENCODING_PREFIX, base.PREFIX], ids=["known prefix", "another prefix"])
@pytest.mark.parametrize("spec", LAYERS)
def test_what_is_charged(pair, spec, prefix):
    """Rows x layers up to the last that counts, one row behind it; a prefix that is not known runs twice so far."""
    engine, _, caches = pair
    prompt = Prompt(prefix, base.CHUNKS, base.SUFFIX, glue=base.GLUE)
    report = engine.prefill(prompt, strategy=f"prophetkv_late:{spec}", recompute_ratio=0.3).report
    num_layers, num_run = len(caches[0][0]), LAYERS[spec][1] + 1
    unknown = len(prefix) - engine.read(prompt).known_prefix
    assert (unknown == 0) == (prefix == base.ENCODING_PREFIX)
    stage_one = unknown + len(base.SUFFIX)
    stage_two = unknown + 2 * len(base.GLUE) + len(base.SUFFIX) + report.recomputed_tokens
    assert report.row_layers == stage_one * num_run + (num_layers - num_run) + stage_two * num_layers
    assert not any(layer._forward_pre_hooks for layer in engine.model.model.layers)


def test_stopping_at_the_end_is_not_stopping(pair):
    engine, _, _ = pair
    plain = engine.prefill(base.prompt(), strategy="prophetkv_late", recompute_ratio=0.3)
    found = engine.prefill(base.prompt(), strategy="prophetkv_late:stop=1", recompute_ratio=0.3)
    assert torch.equal(found.logits, plain.logits)
    assert found.report.row_layers == plain.report.row_layers


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma2", "gemma3_text", "cohere", "phi", "gpt_oss"])
def test_every_family_stops(name):
    """Scores of the layers up to there are those of a stage I that goes on."""
    engine = ProphetKVEngine(families.SUPPORTED[name](), None, config=ProphetKVConfig(encoding_prefix=(3, 1, 4)))
    prompt = Prompt([3, 1, 4, 9], [list(range(10, 30)), list(range(40, 57))], [7, 8, 9, 6], glue=[5])
    up_to = {}
    for last in range(len(engine.support.layers)):
        spy = base.Spy(last_layer=last)
        engine.prefill(prompt, strategy=spy)
        up_to[last] = spy.scores
    whole = [base.Spy(first_layer=first) for first in range(len(up_to))]
    for spy in whole:
        engine.prefill(prompt, strategy=spy)
    for last in range(len(up_to) - 1):
        rest = whole[last + 1].scores
        np.testing.assert_allclose(up_to[last] + rest, up_to[len(up_to) - 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stop", ["0", "0.5", "1.1", "nan", "all"])
def test_bad_stops(stop):
    with pytest.raises(InputError, match=r"stop is .*; allowed: a number above start \(0.5\) up to 1"):
        make_strategy(f"prophetkv_late:stop={stop}")
