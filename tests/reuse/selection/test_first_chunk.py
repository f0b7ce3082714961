"""A first chunk that is not exact, recomputed whole: against the naive implementation and the model's full prefill."""

from __future__ import annotations

import pytest
import torch

from prophetkv_rag import InputError, Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.reuse.selection import make_strategy
from tests.reuse import test_against_naive as base
from tests.reuse.naive.prompt_reference import best_others, context_positions, select

pair = base.pair  # the engine, the naive model and its chunk caches
ROWS = context_positions(base.SEGMENTS)
FIRST = list(range(len(base.PREFIX), len(base.PREFIX) + len(base.CHUNKS[0])))
EXACT = "prophetkv:first_chunk=exact"


def naive_choice(naive, caches, ratio):
    """All of the first chunk, and as many others as the ratio is of all."""
    scores = naive.stage_one_scores(base.SEGMENTS, caches)
    others = ROWS[len(FIRST) :]
    count = int(ratio * len(ROWS) + 1e-9)
    chosen = select(scores[len(FIRST) :], min(1.0, (count + 1e-6) / len(others)), positions=others)
    return scores, sorted([*FIRST, *chosen])


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_against_naive(pair, ratio, share):
    engine, naive, caches = pair
    scores, chosen = naive_choice(naive, caches, ratio)
    others = None if share == 1 else best_others(scores, share, chosen, ROWS)
    found = engine.prefill(base.prompt(), strategy=f"{EXACT},context_share={share}", recompute_ratio=ratio)
    assert found.recomputed.tolist() == chosen
    logits, keys, values = naive.recompute(base.SEGMENTS, caches, chosen, others=others)
    base.close(found.logits[0], logits)
    base.assert_cache(found, keys, values)
    assert found.report.recomputed_tokens == len(chosen)


def test_the_first_chunks_rows_are_full_prefills(pair):
    """It sees the prefix alone, so recomputing it whole makes it exact, whatever the other chunks are."""
    engine, _, _ = pair
    full = engine.prefill(base.prompt(), recompute_ratio=1.0)
    reused, exact = (engine.prefill(base.prompt(), strategy=one, recompute_ratio=0.1) for one in ("prophetkv", EXACT))
    for layer, wanted, stale in zip(*(one.past_key_values.layers for one in (exact, full, reused)), strict=True):
        torch.testing.assert_close(layer.values[:, :, FIRST], wanted.values[:, :, FIRST], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.keys[:, :, FIRST], wanted.keys[:, :, FIRST], atol=1e-5, rtol=1e-4)
        assert layer is not stale
    assert not torch.allclose(stale.values[:, :, FIRST], wanted.values[:, :, FIRST], atol=1e-3)


def test_what_is_charged(pair):
    engine, _, _ = pair
    plain, exact = (
        engine.prefill(base.prompt(), strategy=one, recompute_ratio=0.1).report for one in ("prophetkv", EXACT)
    )
    added = exact.recomputed_tokens - plain.recomputed_tokens
    assert 0 < added <= len(FIRST)
    assert exact.row_layers - plain.row_layers == added * 3
    assert exact.charged_ratio > plain.charged_ratio


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_plain_reuse_and_full_prefill_are_what_they_are(pair, ratio):
    engine, _, _ = pair
    plain, exact = (engine.prefill(base.prompt(), strategy=one, recompute_ratio=ratio) for one in ("prophetkv", EXACT))
    assert torch.equal(plain.logits, exact.logits)
    assert exact.report.recomputed_tokens == plain.report.recomputed_tokens


def test_an_exact_first_chunk_is_left_alone(pair):
    """Nothing of it is recomputed, and the budget is for the others."""
    engine, _, _ = pair
    prompt = Prompt(base.ENCODING_PREFIX, base.CHUNKS, base.SUFFIX, glue=base.GLUE)
    assert engine.read(prompt).exact_first_chunk
    cached, exact, default = (
        engine.prefill(prompt, strategy=one, recompute_ratio=0.3)
        for one in ("prophetkv:first_chunk=cached", EXACT, "prophetkv")
    )
    first = range(engine.read(prompt).chunks[0].stop)
    assert set(cached.recomputed.tolist()).intersection(first)
    assert not set(exact.recomputed.tolist()).intersection(first)
    assert exact.recomputed.shape == cached.recomputed.shape
    assert torch.equal(exact.recomputed, default.recomputed)


def test_a_setting_of_the_engine_and_not_of_rivals(pair):
    engine, _, _ = pair
    config = ProphetKVConfig(encoding_prefix=base.ENCODING_PREFIX, first_chunk="exact")
    other = ProphetKVEngine(engine.model, None, config=config, store=engine.store)
    for name in ("prophetkv", "prophetkv_late", "infoflow", "fusionrag", "qcfuse"):
        spec = f"{name}:first_chunk=exact"
        asked = [
            one.prefill(base.prompt(), strategy=strategy, recompute_ratio=0.3).recomputed.tolist()
            for one, strategy in ((other, name), (engine, name), (engine, spec))
        ]
        assert asked[0] == asked[2 if name.startswith("prophetkv") else 1]
        assert asked[1] != asked[2]
        assert set(FIRST) <= set(asked[2])
    cached = other.prefill(base.prompt(), strategy="prophetkv:first_chunk=cached", recompute_ratio=0.3)
    assert cached.recomputed.tolist() == engine.prefill(base.prompt(), recompute_ratio=0.3).recomputed.tolist()


def test_bad_values():
    with pytest.raises(InputError, match="first_chunk is 'whole'; allowed: cached, opening, exact"):
        make_strategy("prophetkv:first_chunk=whole")
    with pytest.raises(InputError, match="first_chunk is 1"):
        ProphetKVConfig(first_chunk=1)
