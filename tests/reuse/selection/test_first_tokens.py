"""The start of a first chunk that is not exact: recomputed whatever its score. Against the naive implementation."""

from __future__ import annotations

import pytest

from prophetkv_rag import InputError, Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.reuse.selection import make_strategy
from tests.reuse import test_against_naive as base
from tests.reuse.naive.prompt_reference import context_positions, select

pair = base.pair  # the engine, the naive model and its chunk caches
ROWS = context_positions(base.SEGMENTS)
START = len(base.PREFIX)


@pytest.mark.parametrize(
    ("count", "ratio", "expected"), [(3, 0.5, 3), (20, 0.5, 7), (20, 0.8, 9), (2, 0.1, 1), (2, 0, 0)]
)
def test_against_naive(pair, count, ratio, expected):
    """28 context tokens, of which the first chunk has 9; at most half of the budget, and of the chunk all."""
    engine, naive, caches = pair
    scores = naive.stage_one_scores(base.SEGMENTS, caches)
    plain = select(scores, ratio, positions=ROWS)
    forced = list(range(START, START + expected))
    scores[:expected] = 10 + scores[:expected]
    chosen = select(scores, ratio, positions=ROWS)
    assert set(forced) <= set(chosen)
    assert len(chosen) == len(plain)
    found = engine.prefill(base.prompt(), strategy=f"prophetkv:first_tokens={count}", recompute_ratio=ratio)
    assert found.recomputed.tolist() == chosen
    logits, keys, values = naive.recompute(base.SEGMENTS, caches, chosen)
    base.close(found.logits[0], logits)
    base.assert_cache(found, keys, values)


def test_a_setting_of_the_engine_and_not_of_rivals(pair):
    engine, _, _ = pair
    config = ProphetKVConfig(encoding_prefix=base.ENCODING_PREFIX, first_tokens=3)
    other = ProphetKVEngine(engine.model, None, config=config, store=engine.store)
    for name in ("prophetkv", "prophetkv_late", "infoflow", "fusionrag", "qcfuse"):
        asked = other.prefill(base.prompt(), strategy=name, recompute_ratio=0.3).recomputed.tolist()
        spec = f"{name}:first_tokens=3" if name.startswith("prophetkv") else name
        assert asked == engine.prefill(base.prompt(), strategy=spec, recompute_ratio=0.3).recomputed.tolist()
    off = other.prefill(base.prompt(), strategy="prophetkv:first_tokens=0", recompute_ratio=0.3)
    assert off.recomputed.tolist() == engine.prefill(base.prompt(), recompute_ratio=0.3).recomputed.tolist()


def test_an_exact_first_chunk_is_left_alone(pair):
    engine, _, _ = pair
    exact = Prompt(base.ENCODING_PREFIX, base.CHUNKS, base.SUFFIX, glue=base.GLUE)
    assert engine.read(exact).exact_first_chunk
    plain = engine.prefill(exact, recompute_ratio=0.3).recomputed.tolist()
    found = engine.prefill(exact, strategy="prophetkv:first_tokens=4", recompute_ratio=0.3).recomputed.tolist()
    assert found == plain


@pytest.mark.parametrize("value", ["-1", "0.5", "all"])
def test_bad_values(value):
    with pytest.raises(InputError, match=r"first_tokens is .*; it must be a whole number from 0"):
        make_strategy(f"prophetkv:first_tokens={value}")
    with pytest.raises(InputError, match="first_tokens is True"):
        ProphetKVConfig(first_tokens=True)
