"""What recomputed tokens attend to: against the naive float64 implementation, in every family, and where it ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.speed.flops import pass_flops, reuse_flops
from prophetkv_rag.kernels import row_blocks
from prophetkv_rag.reuse.selection import Selection, Strategy, make_strategy
from prophetkv_rag.reuse.selection.context_share import shared_context
from tests import families
from tests.reuse import test_against_naive as base
from tests.reuse.naive.prompt_reference import best_others, context_positions, fresh_positions, select
from tests.reuse.naive.transformers_oracle import holders, reuse_as_one_pass

pair = base.pair  # the engine, the naive model and its chunk caches
SHARES = (0.0, 0.3, 0.6)
ROWS = context_positions(base.SEGMENTS)


def naive_result(naive, caches, ratio, share, **scoring):
    scores = naive.stage_one_scores(base.SEGMENTS, caches, **scoring)
    chosen = select(scores, ratio, positions=ROWS)
    others = best_others(scores, share, chosen, ROWS)
    return chosen, others, naive.recompute(base.SEGMENTS, caches, chosen, others=others)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("ratio", [0.1, 0.4])
@pytest.mark.parametrize("query", [None, base.QUERY])
def test_the_whole_method(pair, ratio, share, query):
    """Fresh rows between and behind the chunks see everything, picked ones what the score says: same K, V, logits."""
    engine, naive, caches = pair
    found = engine.prefill(base.prompt(query=query), strategy=f"prophetkv:context_share={share}", recompute_ratio=ratio)
    chosen, others, (logits, keys, values) = naive_result(naive, caches, ratio, share, extra_query_ids=query)
    assert found.recomputed.tolist() == chosen
    assert found.visible.tolist() == sorted({*chosen, *others, *fresh_positions(base.SEGMENTS)})
    base.close(found.logits[0], logits)
    base.assert_cache(found, keys, values)

    everything = engine.prefill(base.prompt(query=query), recompute_ratio=ratio)  # else this test could not fail
    assert float((everything.logits - found.logits).abs().max()) > 100 * base.TOLERANCE


def test_late_layers_and_the_engines_setting(pair):
    engine, naive, caches = pair
    narrow = ProphetKVEngine(
        engine.model,
        None,
        config=ProphetKVConfig(
            encoding_prefix=base.ENCODING_PREFIX, context_share=0.3, recompute_ratio=0.4, strategy="prophetkv_late"
        ),
        store=engine.store,
    )
    first_layer = len(caches[0][0]) // 2
    _, _, (logits, keys, values) = naive_result(naive, caches, 0.4, 0.3, first_layer=first_layer)
    found = narrow.prefill(base.prompt())
    base.close(found.logits[0], logits)
    base.assert_cache(found, keys, values)
    # A strategy's own option is stronger than the engine's setting.
    own = narrow.prefill(base.prompt(), strategy="prophetkv_late:context_share=1")
    assert own.visible is None
    assert torch.equal(own.logits, engine.prefill(base.prompt(), strategy="prophetkv_late", recompute_ratio=0.4).logits)


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_everything_is_as_it_was(pair, ratio):
    """Bit for bit: share 1 at any ratio; and ratios 0 and 1, which leave nothing to narrow, at any share."""
    engine, _, _ = pair
    plain = engine.prefill(base.prompt(), recompute_ratio=ratio)
    for share in (1, 1.0) if ratio == 0.2 else (0, 0.3, 1):
        found = engine.prefill(base.prompt(), strategy=f"prophetkv:context_share={share}", recompute_ratio=ratio)
        assert found.visible is None
        assert torch.equal(found.logits, plain.logits)
        for own, other in zip(found.past_key_values.layers, plain.past_key_values.layers, strict=True):
            assert torch.equal(own.keys, other.keys)
            assert torch.equal(own.values, other.values)
        assert found.report.attended_share == 1.0


def test_neighbours_come_first_by_hand():
    """Recomputed are 3 and 12; 0 and 11 stand outside the chunks."""
    is_chunk = torch.ones(15, dtype=torch.bool)
    is_chunk[[0, 11]] = False
    scores = torch.tensor([0, 1, 1, 9, 8, 8, 2, 3, 0, 0, 5, 7, 9, 6, 6]).float()
    recomputed = torch.tensor([3, 12])
    # 11 others: 2 (one before), 1 and 10 (two before), 9 (three before), 8 (four before); then 4, 5, 13, 14, 7, 6.
    order = [2, 10, 1, 9, 8, 4, 5, 13, 14, 7, 6]
    for count in range(11):
        found = shared_context(scores, recomputed, is_chunk, (count + 0.5) / 11)
        assert found.tolist() == sorted(order[:count])
    assert shared_context(scores, recomputed, is_chunk, 1) is None


CHUNKS = [[5 + (7 * i) % 80 for i in range(20)], [9 + (11 * i) % 80 for i in range(33)], [2 + i for i in range(18)]]
PREFIX, GLUE, SUFFIX = (3, 1, 4), [2, 7], [7, 8, 9, 6]
PROMPT = Prompt(PREFIX, CHUNKS, SUFFIX, glue=GLUE)
SEGMENTS = [
    (PREFIX, False), (CHUNKS[0], True), (GLUE, False), (CHUNKS[1], True), (GLUE, False), (CHUNKS[2], True),
    (SUFFIX, False),
]  # fmt: skip


class Told(Strategy):
    """Recomputes and shows what it is told."""

    name = "told"

    def __init__(self, positions, visible, **selection):
        self.positions, self.visible, self.selection = torch.tensor(positions), torch.tensor(visible), selection

    def select(self, context):
        return Selection(self.positions, visible=self.visible, **self.selection)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "cohere", "phi"])
@pytest.mark.parametrize("plain_keys", [4, 256])
def test_every_family_by_its_own_attention(name, plain_keys, monkeypatch):
    """As one pass of transformers' model with a mask drawn by positions; sliding windows end among what is gathered."""
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 16)
    monkeypatch.setattr(row_blocks, "MIN_PLAIN_KEYS", plain_keys)
    model = families.SUPPORTED[name]()
    engine = ProphetKVEngine(model, None, config=ProphetKVConfig(encoding_prefix=PREFIX))
    rows = context_positions(SEGMENTS)
    selected, others = rows[3::5], rows[1::3]
    found = engine.prefill(PROMPT, strategy=Told(selected, others))
    wanted, positions, kinds = reuse_as_one_pass(model, PREFIX, SEGMENTS, selected=selected, others=others)
    held = holders(SEGMENTS, positions, kinds, selected)
    np.testing.assert_allclose(found.logits[0], wanted.logits[-1], atol=1e-4, rtol=1e-4)
    for layer, keys, values in zip(found.past_key_values.layers, wanted.keys, wanted.values, strict=True):
        np.testing.assert_allclose(layer.keys[0], keys[:, held], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(layer.values[0], values[:, held], atol=1e-4, rtol=1e-4)
    everything = engine.prefill(PROMPT, strategy=Told(selected, rows))  # else this test could not fail
    assert float((everything.logits - found.logits).abs().max()) > 1e-2


def test_rows_that_were_watched_or_dropped():
    engine = ProphetKVEngine(families.SUPPORTED["llama"](), None, config=ProphetKVConfig(encoding_prefix=(3, 1, 4)))
    with pytest.raises(ValueError, match="watched_layers"):
        engine.prefill(PROMPT, strategy=Told([4, 9], [5], watched_layers=frozenset({1})))
    # Dropped after layer 0, a row is as if it had not been there: its first layer's K and V do not depend on others.
    kept = torch.tensor([4, 30])
    pruned = engine.prefill(PROMPT, strategy=Told([4, 9, 30], [5], prune=lambda view: kept))
    assert pruned.recomputed.tolist() == [4, 30]
    fewer = engine.prefill(PROMPT, strategy=Told([4, 30], [5, 9]))
    torch.testing.assert_close(pruned.logits, fewer.logits, atol=1e-5, rtol=1e-5)


def test_what_is_charged(pair):
    """Rows are charged as ever; keys that were not seen are told, and counted by the arithmetic limit, one by one."""
    engine, _, _ = pair
    found = engine.prefill(base.prompt(), strategy="prophetkv:context_share=0.3", recompute_ratio=0.2)
    plain = engine.prefill(base.prompt(), recompute_ratio=0.2)
    assert found.report.charged_ratio == plain.report.charged_ratio
    assert found.report.row_layers == plain.report.row_layers

    layout = engine.read(base.prompt())
    seen, every = set(found.visible.tolist()), 0
    saved = 0
    fresh = [p for p in fresh_positions(base.SEGMENTS) if p >= layout.known_prefix and p > ROWS[0]]
    for row in [*found.recomputed.tolist(), *fresh]:
        every += row + 1
        if row in ROWS:
            saved += sum(key not in seen for key in range(row + 1))
    assert found.report.attended_share == pytest.approx(1 - saved / every)
    assert plain.report.attended_share == 1.0
    config, layers = engine.model.config, engine.support.layers
    per_key = sum(2 * config.num_attention_heads * (one.head_dim + one.value_head_dim) for one in layers)
    counted = [reuse_flops(engine.model, engine.support, layout, one.recomputed, one.visible) for one in (plain, found)]
    assert counted[0] - counted[1] == pytest.approx(per_key * saved)


def test_windows_are_counted_by_position():
    model = families.SUPPORTED["mistral"](sliding_window=4)
    engine = ProphetKVEngine(model, None, config=ProphetKVConfig(encoding_prefix=(3, 1, 4)))
    visible, rows = torch.tensor([0, 3, 5, 6, 9]), torch.tensor([6, 9])
    fewer = pass_flops(model, engine.support, rows, visible)
    more = pass_flops(model, engine.support, rows)
    per_key = sum(2 * 2 * one.head_dim for one in engine.support.layers) * model.config.num_attention_heads
    # 6 sees 3, 5, 6 of 3..6; 9 sees 6, 9 of 6..9
    assert more - fewer == pytest.approx(per_key * ((4 - 3) + (4 - 2)))


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, "half", True, None])
def test_a_share_is_a_number_from_0_to_1(share):
    with pytest.raises(ValueError, match=r"context_share is .*; it must be a number from 0"):
        ProphetKVConfig(context_share=share)


@pytest.mark.parametrize("spec", ["prophetkv:context_share=1.5", "prophetkv_late:start=0.3,context_share=all"])
def test_a_strategys_share_too(spec):
    with pytest.raises(InputError, match=r"context_share is .*; it must be a number from 0"):
        make_strategy(spec)
    assert np.isclose(make_strategy("prophetkv_late:start=0.3,context_share=0.5").context_share, 0.5)
