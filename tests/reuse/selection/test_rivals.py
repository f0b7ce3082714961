"""EPIC, CacheBlend and KVShare in the engine against the naive float64 rivals, which share no code with it."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from prophetkv_rag import InputError, Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.model import cache_argument
from prophetkv_rag.reuse.selection import Selection, Strategy, make_strategy
from prophetkv_rag.reuse.selection.cacheblend import CacheBlend
from prophetkv_rag.reuse.selection.epic import Epic
from prophetkv_rag.reuse.selection.kvshare import KVShare
from tests import families
from tests.reuse.naive import rivals
from tests.reuse.naive.prompt_reference import context_positions, fresh_positions, prompt_ids
from tests.reuse.naive.transformers_oracle import SHAPES, naive_of
from tests.tiny import tiny_llama

LAYERS = 6  # half of it is 3: gradual filtering narrows after layers 1, 2 and 3
TOLERANCE = 2e-4
FULL = 1e-4  # full recomputation against the model's own forward


def _ids(seed, count):
    return np.random.default_rng(seed).integers(3, 90, count).tolist()


PREFIX, OTHER_PREFIX, GLUE, SUFFIX = _ids(0, 4), _ids(1, 5), _ids(2, 2), _ids(3, 5)
CHUNKS = [_ids(4, 8), _ids(5, 11), _ids(6, 1), _ids(7, 7)]
PROMPTS = {
    "exact_first": Prompt(PREFIX, CHUNKS, SUFFIX, glue=[]),
    "exact_first_glue": Prompt(PREFIX, CHUNKS, SUFFIX, glue=GLUE),
    "inexact_first_glue": Prompt(OTHER_PREFIX, CHUNKS, SUFFIX, glue=GLUE),
    "no_prefix": Prompt([], [CHUNKS[1], CHUNKS[0], CHUNKS[1]], SUFFIX, glue=[]),
}
RATIOS = (0.1, 0.3, 0.6, 0.9)
SPECS = [
    "epic",
    "epic:k=3",
    "kvshare",
    *(f"cacheblend:deviation={d},filtering={f}" for d in ("v", "k", "kv") for f in ("single", "gradual")),
]
FAMILIES = {
    "sliding": partial(families.SUPPORTED["mistral"], num_hidden_layers=LAYERS),
    "softcap": partial(
        families.SUPPORTED["gemma2"], num_hidden_layers=LAYERS, layer_types=["full_attention", "sliding_attention"] * 3
    ),
    "sinks": partial(
        families.SUPPORTED["gpt_oss"], num_hidden_layers=LAYERS, layer_types=["sliding_attention", "full_attention"] * 3
    ),
}
LONG = {  # more rows than one block, more keys than are ever masked
    "long": partial(families.SUPPORTED["llama"], num_hidden_layers=LAYERS),
    "long_sliding": partial(families.SUPPORTED["mistral"], num_hidden_layers=LAYERS, sliding_window=200),
}
FAMILY_PROMPT = Prompt(PREFIX, [_ids(8, 20), _ids(9, 17)], SUFFIX, glue=GLUE)  # longer than two windows


def segments_of(prompt):
    segments = [(prompt.prefix, False)]
    for number, chunk in enumerate(prompt.chunks):
        segments += [(prompt.glue, False)] * (number > 0) + [(chunk, True)]
    return [*segments, (prompt.suffix, False)]


def context_of(prompt):
    return context_positions(segments_of(prompt))


def known_rows(prompt):
    """The prompt's first rows that are those of the encoding prefix: copied, not run."""
    known = 0
    while known < min(len(PREFIX), len(prompt.prefix)) and prompt.prefix[known] == PREFIX[known]:
        known += 1
    return set(range(known))


def noisy_positions(prompt):
    """An exact first chunk: its tokens do not deviate, so which of them fill a budget up is float noise."""
    segments = segments_of(prompt)
    if not rivals.first_chunk_is_exact(segments, PREFIX):
        return set()
    return set(range(*rivals.chunk_spans(segments)[0]))


def budget_of(prompt, ratio):
    return math.floor(ratio * len(context_of(prompt)) + 1e-9)


def engine_of(model, store=None, **settings):
    config = ProphetKVConfig(encoding_prefix=tuple(PREFIX), **settings)
    return ProphetKVEngine(model, None, config=config, store=store)


def llama(shape="gqa", **settings):
    return tiny_llama(
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "head_dim": 8,
            "num_hidden_layers": LAYERS,
            "initializer_range": 0.25,  # far from linear
        }
        | SHAPES[shape]
        | settings
    )


class Setting:
    """One model: in the engine, and as the naive reference."""

    def __init__(self, shape):
        self.model = llama(shape)
        self.naive = naive_of(self.model)
        self.engine = engine_of(self.model)

    def caches(self, prompt):
        return [self.naive.encode_chunk(PREFIX, chunk) for chunk in prompt.chunks]

    def schedule(self, prompt, spec, ratio):
        """Who is computed in each layer, by the naive rivals."""
        naive, segments, budget = self.naive, segments_of(prompt), budget_of(prompt, ratio)
        strategy = make_strategy(spec)
        if strategy.name == "epic":
            amount = {"budget": budget} if strategy.k is None else {"k": strategy.k}
            exact_first = rivals.first_chunk_is_exact(segments, PREFIX)
            chosen = rivals.epic_rows(rivals.chunk_spans(segments), exact_first=exact_first, **amount)
            return rivals.in_all_layers(naive, chosen)
        caches = self.caches(prompt)
        if strategy.name == "kvshare":
            return rivals.from_layer_two(naive, segments, rivals.kvshare_rows(naive, segments, caches, budget))
        variant = strategy.deviation
        if strategy.filtering == "single":
            chosen = rivals.cacheblend_rows(naive, segments, caches, budget, variant=variant)
            return rivals.from_layer_two(naive, segments, chosen)
        counts = [len(context_of(prompt))]
        counts += [min(strategy.kept_after(layer, budget, LAYERS), counts[0]) for layer in range(1, LAYERS)]
        return rivals.cacheblend_gradual_rows(naive, segments, caches, counts, variant=variant)


@pytest.fixture(scope="module")
def gqa():
    return Setting("gqa")


@pytest.fixture(scope="module")
def yarn():
    return Setting("yarn")


@pytest.fixture(params=PROMPTS)
def prompt(request):
    return PROMPTS[request.param]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return engine_of(FAMILIES[request.param]())


def run(engine, prompt, strategy, ratio, **settings):
    """The result, and the positions that each layer's attention got, as the model's own modules saw them."""
    engine.add_chunks(prompt.chunks)  # encoding runs the model, too
    rows = []

    def note(module, args, kwargs):
        rows.append(kwargs["position_ids"][0].tolist())

    hooks = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in engine.model.model.layers]
    try:
        result = engine.prefill(prompt, strategy=strategy, recompute_ratio=ratio, **settings)
    finally:
        for hook in hooks:
            hook.remove()
    return result, rows


def close(actual, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(
        np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64), atol=tolerance, rtol=tolerance
    )


def assert_cache(result, keys, values, tolerance=TOLERANCE):
    for layer, own_keys, own_values in zip(result.past_key_values.layers, keys, values, strict=True):
        close(layer.keys[0], own_keys, tolerance)
        close(layer.values[0], own_values, tolerance)


def assert_same_bits(result, other):
    assert torch.equal(result.logits, other.logits)
    for own, others in zip(result.past_key_values.layers, other.past_key_values.layers, strict=True):
        assert torch.equal(own.keys, others.keys)
        assert torch.equal(own.values, others.values)


def plain_forward(model, input_ids, **settings):
    """The model's own prefill: its output, keys and values."""
    cache = DynamicCache()
    with torch.no_grad():
        output = model(input_ids, **cache_argument(model, cache), use_cache=True, **settings)
    return output, [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers]


def assert_full(engine, result):
    output, keys, values = plain_forward(engine.model, result.input_ids)
    close(result.logits, output.logits[:, -1], FULL)
    assert_cache(result, keys, values, FULL)


def assert_stale_where_not_run(engine, prompt, result, rows, *, moving_from=1):
    """Chunk tokens are stale, bit by bit, in the layers in which they did not run, and only there.

    Layer 0 depends on the token alone; layer 1 too, as to what is outside its chunk, where layer 0 has a window.
    """
    context, noise = context_of(prompt), noisy_positions(prompt)
    stale = engine.prefill(prompt, strategy="full_reuse").past_key_values.layers
    for index, (layer, ran) in enumerate(zip(result.past_key_values.layers, rows, strict=True)):
        rest = sorted(set(context) - set(ran))
        assert torch.equal(layer.keys[:, :, rest], stale[index].keys[:, :, rest])
        assert torch.equal(layer.values[:, :, rest], stale[index].values[:, :, rest])
        if index >= moving_from:
            computed = sorted(set(context) & set(ran) - noise)
            moved = (layer.values - stale[index].values)[0, :, computed].abs().amax(dim=(0, 2))
            assert bool((moved > 1e-4).all())


# Same rows, same numbers


def check_against_naive(setting, prompt, spec, ratio):
    segments, context, noise = segments_of(prompt), context_of(prompt), noisy_positions(prompt)
    fresh = fresh_positions(segments)
    run_anyway = set(fresh) - known_rows(prompt)
    schedule = setting.schedule(prompt, spec, ratio)
    result, rows = run(setting.engine, prompt, spec, ratio)

    assert result.input_ids[0].tolist() == prompt_ids(segments)
    assert len(rows) == len(schedule) == LAYERS
    for ran, scheduled in zip(rows, schedule, strict=True):
        assert ran == sorted(set(ran))
        assert len(ran) == len(scheduled) + len(run_anyway)
        assert set(ran) - noise == {*scheduled, *run_anyway} - noise

    naive = rivals.run_with_schedule(setting.naive, segments, setting.caches(prompt), schedule)
    close(result.logits[0], naive.logits)
    assert_cache(result, naive.keys, naive.values)
    assert_stale_where_not_run(setting.engine, prompt, result, rows)

    report = result.report
    assert report.charged_ratio == pytest.approx(naive.charged / (len(context) * LAYERS), rel=1e-12)
    assert report.row_layers == naive.charged + len(run_anyway) * LAYERS == sum(map(len, rows))
    assert result.recomputed.tolist() == sorted(set(rows[-1]) - set(fresh))
    assert report.recomputed_tokens == len(schedule[-1])
    assert report.reused_tokens == len(context) - len(schedule[-1])
    assert (report.fresh_tokens, report.chunk_tokens) == (len(fresh), len(context))
    assert (report.strategy, report.recompute_ratio) == (spec.partition(":")[0], ratio)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("spec", SPECS)
def test_against_naive(gqa, prompt, spec, ratio):
    """Same rows in every layer, same logits, keys and values, same budget; the rest stays stale."""
    check_against_naive(gqa, prompt, spec, ratio)


@pytest.mark.parametrize("spec", SPECS)
def test_against_naive_with_scaled_rope(yarn, spec):
    check_against_naive(yarn, PROMPTS["inexact_first_glue"], spec, 0.3)


@pytest.mark.parametrize("k", [0, 1, 2, 9, 99])
def test_epic_takes_k_whatever_the_ratio(gqa, prompt, k):
    for ratio in (0.1, 0.7):
        check_against_naive(gqa, prompt, f"epic:k={k}", ratio)


def test_epic_with_all_budgets(gqa, prompt):
    """The last budgets are beyond what an exact first chunk leaves to buy; a budget of all is full prefill's."""
    segments, context = segments_of(prompt), context_of(prompt)
    exact_first = rivals.first_chunk_is_exact(segments, PREFIX)
    for budget in range(len(context)):
        result = gqa.engine.prefill(prompt, strategy="epic", recompute_ratio=budget / len(context))
        chosen = rivals.epic_rows(rivals.chunk_spans(segments), budget=budget, exact_first=exact_first)
        assert result.report.recomputed_tokens == len(chosen)
        assert result.report.charged_ratio == pytest.approx(len(chosen) / len(context))


def test_an_exact_first_chunk_is_skipped_by_epic_and_only_then(gqa):
    chunk = CHUNKS[0]
    for prefix, first in ((PREFIX, False), (OTHER_PREFIX, True), ([*PREFIX, 5], True), (PREFIX[:-1], True)):
        prompt = Prompt(prefix, [chunk, CHUNKS[1]], SUFFIX, glue=[])
        _, rows = run(gqa.engine, prompt, Epic(k=2), 0.5)
        starts = [len(prefix)] * first + [len(prefix) + len(chunk)]
        assert set(rows[0]) & set(context_of(prompt)) == {start + offset for start in starts for offset in (0, 1)}


def test_a_query_apart_from_the_prompt_changes_nothing(gqa):
    """These strategies do not run stage I, and extra rows of a question must not leak into the attention received."""
    prompt = PROMPTS["exact_first_glue"]
    for spec in SPECS:
        plain, rows = run(gqa.engine, prompt, spec, 0.3)
        asked, asked_rows = run(gqa.engine, prompt, spec, 0.3, query=_ids(20, 6))
        assert rows == asked_rows
        assert_same_bits(plain, asked)
        assert plain.report.charged_ratio == asked.report.charged_ratio


def test_the_store_and_the_model_are_left_as_they_were(gqa):
    prompt = PROMPTS["exact_first_glue"]
    before = gqa.engine.prefill(prompt, strategy="full_reuse")
    for spec in SPECS:
        first = gqa.engine.prefill(prompt, strategy=spec, recompute_ratio=0.3)
        assert_same_bits(first, gqa.engine.prefill(prompt, strategy=spec, recompute_ratio=0.3))
        assert_same_bits(before, gqa.engine.prefill(prompt, strategy="full_reuse"))
    assert not any(layer._forward_pre_hooks for layer in gqa.model.model.layers)


# Both ends of the budget


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_plain_reuse(gqa, prompt, spec):
    plain = gqa.engine.prefill(prompt, strategy="full_reuse")
    ratios = (0.0,) if "k=" in spec else (0.0, 0.9 / len(context_of(prompt)))  # the second buys no token either
    for ratio in ratios:
        result = gqa.engine.prefill(prompt, strategy=spec, recompute_ratio=ratio)
        assert_same_bits(result, plain)
        assert (result.report.recomputed_tokens, result.report.charged_ratio) == (0, 0.0)
        fresh = plain.report.fresh_tokens - len(known_rows(prompt))
        assert result.report.row_layers == plain.report.row_layers == fresh * LAYERS
    assert plain.report.charged_ratio == 0.0


@pytest.mark.parametrize("spec", SPECS)
def test_everything_is_full_prefill(gqa, prompt, spec):
    num_context = len(context_of(prompt))
    result, rows = run(gqa.engine, prompt, spec, 1.0)
    assert_full(gqa.engine, result)
    known = len(known_rows(prompt))
    assert rows == [list(range(known, len(result.input_ids[0])))] * LAYERS
    full = gqa.engine.prefill(prompt, strategy="full_prefill")
    close(result.logits, full.logits, FULL)
    for report in (result.report, full.report):
        assert (report.recomputed_tokens, report.reused_tokens, report.charged_ratio) == (num_context, 0, 1.0)
    assert result.report.row_layers == LAYERS * (result.report.prompt_tokens - known)
    assert full.report.row_layers == LAYERS * full.report.prompt_tokens


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_model_that_ends_where_the_decision_falls(num_layers, spec):
    """Nothing is left to drop rows from: CacheBlend and KVShare are full prefill, and say so."""
    engine, prompt = engine_of(llama(num_hidden_layers=num_layers)), PROMPTS["inexact_first_glue"]
    result = engine.prefill(prompt, strategy=spec, recompute_ratio=0.3)
    if spec.startswith("epic"):
        assert result.report.charged_ratio == result.report.recomputed_tokens / len(context_of(prompt))
    else:
        assert_full(engine, result)
        assert (result.report.recomputed_tokens, result.report.charged_ratio) == (len(context_of(prompt)), 1.0)


@pytest.mark.parametrize("spec", SPECS)
def test_a_prompt_without_chunks_is_plain_prefill(gqa, spec):
    for ratio in (0.0, 0.3, 1.0):
        result = gqa.engine.prefill(Prompt(PREFIX, [], SUFFIX), strategy=spec, recompute_ratio=ratio)
        assert_full(gqa.engine, result)
        report = result.report
        assert (report.chunk_tokens, report.reused_tokens, report.recomputed_tokens) == (0, 0, 0)
        assert report.fresh_tokens == report.prompt_tokens == len(PREFIX) + len(SUFFIX)
        assert report.chunks == []


@pytest.mark.parametrize("spec", SPECS)
def test_a_prompt_that_ends_with_a_chunk(gqa, spec):
    """Its last token is always computed."""
    prompt = Prompt(PREFIX, CHUNKS[:2], [])
    plain = gqa.engine.prefill(prompt, strategy="full_reuse")
    assert_same_bits(gqa.engine.prefill(prompt, strategy=spec, recompute_ratio=0.0), plain)
    full = gqa.engine.prefill(prompt, strategy=spec, recompute_ratio=1.0)
    assert_full(gqa.engine, full)
    assert full.report.recomputed_tokens == 19
    result, rows = run(gqa.engine, prompt, spec, 0.4)
    assert all(22 in ran for ran in rows)
    assert result.report.recomputed_tokens == len(set(rows[-1]) - set(range(4)))


# Gradual filtering's schedule


def test_kept_after():
    for deviation in ("v", "k", "kv"):
        single, gradual = CacheBlend(deviation), CacheBlend(deviation, "gradual")
        for num_layers, budget in itertools.product((2, 3, 4, 5, 6, 9, 16, 33), (1, 2, 7, 30, 101)):
            assert [single.kept_after(layer, budget, num_layers) for layer in (0, 1, 2)] == [None, budget, None]
            counts = [gradual.kept_after(layer, budget, num_layers) for layer in range(num_layers)]
            assert counts[0] is None  # nothing has moved in layer 0
            assert counts[1] == math.ceil(1.5 * budget)
            assert counts[1:] == sorted(counts[1:], reverse=True)
            half = max(2, num_layers // 2)
            assert all(count == budget for count in counts[half:])
            assert all(budget <= count <= math.ceil(1.5 * budget) for count in counts[1:])
    written_out = [CacheBlend("v", "gradual").kept_after(layer, 100, 10) for layer in range(10)]
    assert written_out == [None, 150, 138, 125, 113, *[100] * 5]


def test_kept_after_is_linear_without_float_noise():
    for num_layers, budget in itertools.product(range(3, 41), range(1, 220)):
        last = max(2, num_layers // 2)
        for layer in range(1, num_layers):
            surplus = Fraction(max(0, last - layer), 2 * (last - 1))
            want = math.ceil(budget * (1 + surplus))
            assert CacheBlend("v", "gradual").kept_after(layer, budget, num_layers) == want


# Attention received


class Watcher(Strategy):
    """All chunk tokens, of which `kept` go on after layer 1; keeps the layers' views."""

    name = "watcher"

    def __init__(self, kept, layers):
        self.kept, self.layers, self.views = kept, frozenset(layers), []

    def select(self, context):
        def prune(view):
            self.views.append(view)
            return torch.tensor(self.kept) if view.layer_idx == 1 else None

        return Selection(context.is_chunk.nonzero()[:, 0], prune=prune, watched_layers=self.layers)


def test_attention_received_and_rows_against_naive(gqa, prompt):
    """Also in a layer in which some rows are gone: the mean is over those that ran."""
    segments, context = segments_of(prompt), context_of(prompt)
    fresh, total = fresh_positions(segments), len(prompt_ids(segments))
    kept = context[2::3]
    watcher, expected = Watcher(kept, {1, 3}), []

    def choose(view):
        expected.append(view)
        return kept if view.layer >= 1 else view.rows

    rivals._run(gqa.naive, segments, gqa.caches(prompt), context, choose)
    gqa.engine.prefill(prompt, strategy=watcher)
    assert [view.layer_idx for view in watcher.views] == list(range(LAYERS - 1))
    for view, naive in zip(watcher.views, expected, strict=False):
        rows = view.rows.tolist()
        assert rows == sorted({*naive.rows, *fresh} - known_rows(prompt))
        of_chunks = [index for index, row in enumerate(rows) if row in context]
        of_prompt = [rows[index] for index in of_chunks]
        close(view.fresh_keys, naive.keys[:, rows])
        close(view.fresh_values, naive.values[:, rows])
        close(view.stale_keys[:, of_chunks], naive.stale_keys[:, of_prompt])
        close(view.stale_values[:, of_chunks], naive.stale_values[:, of_prompt])
        of_fresh = sorted(set(range(len(rows))) - set(of_chunks))
        assert not bool(view.stale_keys[:, of_fresh].any())
        assert not bool(view.stale_values[:, of_fresh].any())
        if view.layer_idx not in (1, 3):
            assert view.attention_received is None
            continue
        received = naive.attention.sum(axis=(0, 1)) / len(naive.attention) / len(rows)
        assert view.attention_received.shape == (total,)
        close(view.attention_received[context], received[context], 1e-5)
        assert not bool(view.attention_received[fresh].any())


def test_watching_changes_no_number(gqa):
    prompt = PROMPTS["exact_first_glue"]
    kept = context_of(prompt)[::4]
    unwatched = gqa.engine.prefill(prompt, strategy=Watcher(kept, ()))
    watched = gqa.engine.prefill(prompt, strategy=Watcher(kept, range(LAYERS)))
    close(watched.logits, unwatched.logits, 1e-5)
    assert watched.report.row_layers == unwatched.report.row_layers


def eager_attention(name, input_ids):
    """Layer 1's attention weights in a full prefill, `[heads, N, N]`, and all values, by transformers' eager code."""
    model = (FAMILIES | LONG)[name]()
    model.set_attn_implementation("eager")
    output, _, values = plain_forward(model, input_ids, output_attentions=True)
    return output.attentions[1][0].double(), values


@pytest.mark.parametrize("name", [*FAMILIES, *LONG])
def test_kvshare_by_transformers_attention_weights(name):
    """Layers 0 and 1 run in full, so what is received in layer 1 is what a full prefill pays there."""
    model = (FAMILIES | LONG)[name]()
    prompt = Prompt(PREFIX, [_ids(10, 170), _ids(11, 240)], SUFFIX, glue=GLUE) if name in LONG else FAMILY_PROMPT
    engine, context = engine_of(model), context_of(prompt)
    watcher = Watcher(context[::2], {1})
    result = engine.prefill(prompt, strategy=watcher)
    weights, values = eager_attention(name, result.input_ids)
    num_heads, num_rows, num_keys = weights.shape
    received = torch.zeros(num_keys, dtype=torch.float64)
    for head in range(num_heads):
        for row in range(num_rows):
            received += weights[head, row] / (num_heads * (num_rows - len(known_rows(prompt))))
    if name == "sinks":
        assert float(weights[:, -1].sum(-1).max()) < 0.999  # the sinks take their part
    elif name == "softcap":
        assert not bool(weights[:, -1, : num_keys - families.WINDOW].any())  # layer 1 has a window
    own = watcher.views[1].attention_received
    np.testing.assert_allclose(own[context], received[context], rtol=1e-4, atol=1e-8)

    stale = engine.prefill(prompt, strategy="full_reuse").past_key_values.layers[1].values[0]
    moved = (values[1] - stale).double().abs().sum(dim=(0, 2))
    budget = budget_of(prompt, 0.2)
    ranked = sorted(context, key=lambda position: -float(received[position] * moved[position]))
    _, rows = run(engine, prompt, "kvshare", 0.2)
    assert sorted(set(rows[2]) & set(context)) == sorted(ranked[:budget])


# Windows, soft-capping, sinks


def expected_charge(spec, budget, num_context):
    strategy = make_strategy(spec)
    if strategy.name == "epic":
        in_layers = [budget if strategy.k is None else strategy.k] * LAYERS  # one chunk is not exact
    elif strategy.name == "cacheblend" and strategy.filtering == "gradual":
        in_layers = [num_context] * 2 + [math.ceil(budget * share) for share in (1.5, 1.25, 1.0, 1.0)]
    else:
        in_layers = [num_context] * 2 + [budget] * (LAYERS - 2)
    return sum(in_layers) / (num_context * LAYERS)


@pytest.mark.parametrize("spec", SPECS)
def test_families(family, spec):
    context = context_of(FAMILY_PROMPT)
    full, rows = run(family, FAMILY_PROMPT, spec, 1.0)
    assert_full(family, full)
    assert rows == [list(range(len(known_rows(FAMILY_PROMPT)), len(full.input_ids[0])))] * LAYERS
    assert (full.report.recomputed_tokens, full.report.charged_ratio) == (len(context), 1.0)

    budget = 11
    result, rows = run(family, FAMILY_PROMPT, spec, budget / len(context))
    assert result.report.charged_ratio == pytest.approx(expected_charge(spec, budget, len(context)))
    assert result.report.row_layers == sum(map(len, rows))
    assert result.report.recomputed_tokens == len(set(rows[-1]) & set(context))
    assert_stale_where_not_run(family, FAMILY_PROMPT, result, rows, moving_from=2)
    if spec.startswith("epic"):
        return
    # Two layers in full: what goes on is exact up to layer 2.
    _, keys, values = plain_forward(family.model, result.input_ids)
    for index, ran in enumerate(rows[:3]):
        close(result.past_key_values.layers[index].keys[0][:, ran], keys[index][:, ran], FULL)
        close(result.past_key_values.layers[index].values[0][:, ran], values[index][:, ran], FULL)


# Options by spec string


@pytest.mark.parametrize(
    ("spec", "strategy"),
    [
        ("epic", Epic()),
        ("epic:k=16", Epic(k=16)),
        ("epic:k=0", Epic(k=0)),
        ("kvshare", KVShare()),
        ("cacheblend", CacheBlend("v", "single")),
        ("cacheblend:", CacheBlend()),
        ("cacheblend:deviation=k", CacheBlend("k", "single")),
        ("cacheblend:filtering=gradual", CacheBlend("v", "gradual")),
        ("cacheblend:filtering=gradual,deviation=kv", CacheBlend("kv", "gradual")),
    ],
)
def test_specs(gqa, spec, strategy):
    assert make_strategy(spec) == strategy
    prompt = PROMPTS["no_prefix"]
    by_spec = gqa.engine.prefill(prompt, strategy=spec, recompute_ratio=0.3)
    assert_same_bits(by_spec, gqa.engine.prefill(prompt, strategy=strategy, recompute_ratio=0.3))
    # On the same caches: encoded again, in a batch of another shape, they may differ in their last bits.
    configured = engine_of(gqa.model, gqa.engine.store, strategy=spec, recompute_ratio=0.3)
    assert_same_bits(by_spec, configured.prefill(prompt))
    assert by_spec.report.strategy == strategy.name


BAD_SPECS = [
    ("epik", "unknown strategy 'epik'; allowed: .*cacheblend, epic, kvshare"),
    ("EPIC", "unknown strategy 'EPIC'"),
    ("epic k=3", "unknown strategy 'epic k=3'"),
    (":k=3", "unknown strategy ''"),
    ("epic:deviation=k", "'epic' has no option 'deviation'; allowed: k"),
    ("cacheblend:k=3", "'cacheblend' has no option 'k'; allowed: deviation, filtering"),
    ("cacheblend:name=x", "'cacheblend' has no option 'name'"),
    ("cacheblend:gradual", "'cacheblend' has no option 'gradual'"),
    ("kvshare:k=3", "'kvshare' has no option 'k'; allowed: none"),
    ("prophetkv:k=3", "'prophetkv' has no option 'k'; allowed: context_share"),
    ("prophetkv_late:k=3", "'prophetkv_late' has no option 'k'; allowed: context_share, first_chunk, start, stop"),
    ("prophetkv_late:start=1", "start is 1; allowed: a number from 0"),
    ("prophetkv_late:start=-0.1", "start is -0.1; allowed: a number from 0"),
    ("prophetkv_late:start=half", "start is 'half'; allowed: a number from 0"),
    ("full_reuse:k=3", "'full_reuse' has no option 'k'; allowed: none"),
    ("cacheblend:deviation=q", "deviation is 'q'; allowed: v, k, kv"),
    ("cacheblend:deviation=vk", "deviation is 'vk'; allowed: v, k, kv"),
    ("cacheblend:deviation=", "deviation is ''; allowed: v, k, kv"),
    ("cacheblend:deviation", "deviation is ''; allowed: v, k, kv"),
    ("cacheblend:deviation=1", "deviation is 1; allowed: v, k, kv"),
    ("cacheblend:deviation=v,filtering=double", "filtering is 'double'; allowed: single, gradual"),
    ("epic:k=-1", "k is -1; it must be a whole number from 0"),
]


@pytest.mark.parametrize(("spec", "message"), BAD_SPECS)
def test_bad_specs(gqa, spec, message):
    with pytest.raises(InputError, match=message):
        make_strategy(spec)
    with pytest.raises(InputError, match=message):
        gqa.engine.prefill(PROMPTS["no_prefix"], strategy=spec)
    with pytest.raises(InputError, match=message):
        engine_of(gqa.model, strategy=spec)


# Found by these tests, and fixed


@pytest.mark.parametrize("value", ["1.5", "nan", "inf", "1e1"])
def test_epic_refuses_a_k_that_is_no_integer(value):
    with pytest.raises(InputError, match="k is"):
        make_strategy(f"epic:k={value}")


@pytest.mark.parametrize("option", ["k=many", "k=", "k", "k=None"])
def test_epic_says_what_k_must_be(option):
    with pytest.raises(InputError, match="k is"):
        make_strategy(f"epic:{option}")


def test_epic_takes_k_at_a_ratio_that_buys_no_token(gqa):
    """Its docstring: k holds whatever the ratio between 0 and 1."""
    report = gqa.engine.prefill(PROMPTS["no_prefix"], strategy="epic:k=2", recompute_ratio=0.02).report
    assert report.recomputed_tokens == 6


def test_charged_ratio_of_a_prompt_that_ends_with_a_chunk(gqa):
    """The report's docstring: all rows x layers beyond one pass of the fresh tokens, over chunk tokens x layers."""
    for spec in ("full_prefill", "cacheblend", "kvshare", "epic"):
        report = gqa.engine.prefill(Prompt(PREFIX, CHUNKS[:2], []), strategy=spec, recompute_ratio=1.0).report
        known = 0 if spec == "full_prefill" else len(PREFIX)
        want = (report.row_layers - (report.fresh_tokens - known) * LAYERS) / (report.chunk_tokens * LAYERS)
        assert (report.charged_ratio, want) == (1.0, 1.0)
