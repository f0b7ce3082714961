"""The references for EPIC, CacheBlend and KVShare: written-out cases, and what must hold at both ends of the budget."""

import ast
import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.reuse.naive import rivals
from tests.reuse.naive.llama_reference import NaiveLlama
from tests.reuse.naive.prompt_reference import context_positions, prompt_ids, suffix_positions
from tests.reuse.naive.rivals import (
    cacheblend_gradual_rows,
    cacheblend_rows,
    cacheblend_scores,
    chunk_spans,
    epic_rows,
    first_chunk_is_exact,
    from_layer_two,
    in_all_layers,
    kvshare_rows,
    kvshare_scores,
    run_with_schedule,
)
from tests.reuse.naive.transformers_oracle import naive_of, transformers_pass
from tests.reuse.naive.transformers_oracle import tiny_llama as oracle_llama
from tests.tiny import tiny_llama

LAYERS = 5
EXACT = 1e-9


def _ids(seed, count):
    return np.random.default_rng(seed).integers(0, 90, count).tolist()


PREFIX = _ids(1, 3)
PROMPTS = {
    "no_glue": [(PREFIX, False), (_ids(2, 5), True), (_ids(4, 1), True), (_ids(6, 7), True), (_ids(7, 4), False)],
    "glue": [(PREFIX, False), (_ids(2, 5), True), (_ids(3, 2), False), (_ids(6, 6), True), (_ids(7, 3), False)],
    "inexact_first": [(_ids(8, 4), False), (_ids(2, 6), True), (_ids(6, 6), True), (_ids(7, 3), False)],
    "no_prefix": [(_ids(2, 5), True), (_ids(6, 6), True), (_ids(7, 3), False)],
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=32,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=LAYERS,
        initializer_range=0.3,
    )


@pytest.fixture(scope="module")
def naive(model):
    return NaiveLlama(model.state_dict(), model.config)


@pytest.fixture(params=PROMPTS)
def case(request, naive):
    segments = PROMPTS[request.param]
    return segments, _encode(naive, segments)


def _close(got, want, tolerance=EXACT):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=tolerance)


def _assert_run(run, logits, keys, values, first_layer=0):
    _close(run.logits, logits)
    _close(run.keys[first_layer:], keys)
    _close(run.values[first_layer:], values)


def _assert_full(naive, segments, run):
    logits, keys, values = naive.full_prefill(prompt_ids(segments))
    _assert_run(run, logits[-1], keys, values)


def _encode(naive, segments):
    return [naive.encode_chunk(PREFIX, ids) for ids, is_chunk in segments if is_chunk]


SPANS = [(3, 8), (8, 9), (11, 15)]  # 5, 1 and 4 tokens, with two of glue before the last


@pytest.mark.parametrize(
    ("k", "exact_first", "want"),
    [
        (0, False, []),
        (1, False, [3, 8, 11]),
        (2, False, [3, 4, 8, 11, 12]),
        (4, False, [3, 4, 5, 6, 8, 11, 12, 13, 14]),
        (5, False, [3, 4, 5, 6, 7, 8, 11, 12, 13, 14]),
        (99, False, [3, 4, 5, 6, 7, 8, 11, 12, 13, 14]),
        (1, True, [8, 11]),
        (3, True, [8, 11, 12, 13]),
        (99, True, [8, 11, 12, 13, 14]),
    ],
)
def test_epic_takes_the_first_k_of_each_chunk(k, exact_first, want):
    assert epic_rows(SPANS, k, exact_first=exact_first) == want


@pytest.mark.parametrize(
    ("budget", "exact_first", "want"),
    [
        (0, False, []),
        (1, False, [3]),  # k = 0, one left
        (2, False, [3, 8]),
        (3, False, [3, 8, 11]),  # k = 1
        (4, False, [3, 4, 8, 11]),  # k = 1, one left: the first chunk's second
        (5, False, [3, 4, 8, 11, 12]),  # k = 2: the short chunk has no second
        (6, False, [3, 4, 5, 8, 11, 12]),
        (8, False, [3, 4, 5, 6, 8, 11, 12, 13]),  # k = 3, one left
        (9, False, [3, 4, 5, 6, 8, 11, 12, 13, 14]),  # k = 4
        (10, False, [3, 4, 5, 6, 7, 8, 11, 12, 13, 14]),
        (11, False, [3, 4, 5, 6, 7, 8, 11, 12, 13, 14]),  # more than there is
        (0, True, []),
        (1, True, [8]),
        (2, True, [8, 11]),
        (3, True, [8, 11, 12]),
        (5, True, [8, 11, 12, 13, 14]),
        (99, True, [8, 11, 12, 13, 14]),  # an exact first chunk is not bought, however much is left
    ],
)
def test_epic_spends_its_budget(budget, exact_first, want):
    assert epic_rows(SPANS, budget=budget, exact_first=exact_first) == want


def test_epic_with_one_chunk():
    assert epic_rows([(2, 6)], 3, exact_first=True) == []
    assert epic_rows([(2, 6)], budget=3, exact_first=True) == []
    assert epic_rows([(2, 6)], 3, exact_first=False) == [2, 3, 4]


def test_epic_sets_are_nested_and_are_dealt_out_in_rounds():
    for lengths in itertools.product([1, 2, 5, 7], repeat=3):
        starts = np.cumsum([4, *lengths]).tolist()
        spans = list(itertools.pairwise(starts))
        rounds = [start + offset for offset in range(7) for start, end in spans if start + offset < end]
        for budget in range(sum(lengths) + 1):
            assert epic_rows(spans, budget=budget, exact_first=False) == sorted(rounds[:budget])


def test_epic_wants_k_or_a_budget():
    with pytest.raises(ValueError, match="k or budget"):
        epic_rows(SPANS, exact_first=False)
    with pytest.raises(ValueError, match="k or budget"):
        epic_rows(SPANS, 1, 1, exact_first=False)


def test_where_chunks_lie_and_whether_the_first_is_exact():
    assert chunk_spans(PROMPTS["no_glue"]) == [(3, 8), (8, 9), (9, 16)]
    assert chunk_spans(PROMPTS["glue"]) == [(3, 8), (10, 16)]
    exact = {name: first_chunk_is_exact(segments, PREFIX) for name, segments in PROMPTS.items()}
    assert exact == {"no_glue": True, "glue": True, "inexact_first": False, "no_prefix": False}
    assert first_chunk_is_exact(PROMPTS["no_prefix"], [])


def test_one_set_in_all_layers_is_stage_two(naive, case):
    segments, caches = case
    for k in (0, 1, 3):
        rows = epic_rows(chunk_spans(segments), k, exact_first=False)
        run = run_with_schedule(naive, segments, caches, in_all_layers(naive, rows))
        _assert_run(run, *naive.recompute(segments, caches, rows))
        assert run.charged == LAYERS * len(rows)


def test_all_selected_is_full_prefill(naive, case):
    segments, caches = case
    everything = context_positions(segments)
    total = len(everything)
    assert cacheblend_rows(naive, segments, caches, total) == everything
    assert kvshare_rows(naive, segments, caches, total) == everything
    gradual = cacheblend_gradual_rows(naive, segments, caches, [total] * LAYERS)
    assert gradual == in_all_layers(naive, everything) == from_layer_two(naive, segments, everything)
    run = run_with_schedule(naive, segments, caches, gradual)
    _assert_full(naive, segments, run)
    assert run.charged == LAYERS * total


def test_an_exact_first_chunk_can_be_left_out(naive):
    segments = PROMPTS["no_glue"]
    caches = _encode(naive, segments)
    rows = epic_rows(chunk_spans(segments), 7, exact_first=True)
    assert rows == list(range(8, 16))
    _assert_full(naive, segments, run_with_schedule(naive, segments, caches, in_all_layers(naive, rows)))


def test_none_selected_is_fresh_up_to_layer_one_and_stale_behind(naive, case):
    segments, caches = case
    context, suffix = context_positions(segments), suffix_positions(segments)
    assert cacheblend_rows(naive, segments, caches, 0) == kvshare_rows(naive, segments, caches, 0) == []
    run = run_with_schedule(naive, segments, caches, from_layer_two(naive, segments, []))
    logits, keys, values = naive.full_prefill(prompt_ids(segments))
    stale_keys, stale_values = naive.assemble(segments, caches)
    for layer in range(2):
        _close(run.keys[layer], keys[layer])
        _close(run.values[layer], values[layer])
    for layer in range(2, LAYERS):
        np.testing.assert_array_equal(run.keys[layer][:, context], stale_keys[layer][:, context])
        np.testing.assert_array_equal(run.values[layer][:, context], stale_values[layer][:, context])
    _close(run.values[2][:, suffix], values[2][:, suffix])  # what goes into layer 2 is still exact
    assert np.abs(run.values[3][:, suffix] - values[3][:, suffix]).max() > 1e-3
    assert np.abs(run.logits - logits[-1]).max() > 1e-3
    assert run.charged == 2 * len(context)


def test_layer_zero_is_never_stale(naive, case):
    segments, caches = case
    context = context_positions(segments)
    stale_keys, stale_values = naive.assemble(segments, caches)
    _, keys, values = naive.full_prefill(prompt_ids(segments))
    _close(stale_keys[0][:, context], keys[0][:, context])
    _close(stale_values[0][:, context], values[0][:, context])


def test_a_selection_from_layer_two_is_stage_two_of_the_layers_behind(naive, model, case):
    """Layers 2 to 4 as a model of their own, with the full prefill's hidden states for embeddings."""
    segments, caches = case
    selected = cacheblend_rows(naive, segments, caches, 4)
    run = run_with_schedule(naive, segments, caches, from_layer_two(naive, segments, selected))
    head, tail = _split(naive, model, 2)
    ids = prompt_ids(segments)
    hidden = head._run_rows(ids, range(len(ids)), *head._empty(len(ids)), visible=range(len(ids)))
    tail.embeddings = np.stack(hidden)
    numbered, start = [], 0
    for segment, is_chunk in segments:
        numbered.append((range(start, start + len(segment)), is_chunk))
        start += len(segment)
    stale = [(keys[2:], values[2:]) for keys, values in caches]
    _assert_run(run, *tail.recompute(numbered, stale, selected), first_layer=2)
    assert run.charged == 2 * len(context_positions(segments)) + 3 * 4


def _split(naive, model, layers):
    """The first `layers` of the model, and the rest."""
    head, tail = NaiveLlama(model.state_dict(), model.config), NaiveLlama(model.state_dict(), model.config)
    head.num_layers, tail.num_layers = layers, naive.num_layers - layers
    for name, weight in naive.weights.items():
        for layer in range(layers, naive.num_layers):
            if name.startswith(f"model.layers.{layer}."):
                tail.weights[name.replace(f".{layer}.", f".{layer - layers}.", 1)] = weight
    return head, tail


def test_gradual_filtering_with_one_step_is_the_single_selection(naive, case):
    segments, caches = case
    total = len(context_positions(segments))
    for count in (0, 1, 4):
        for variant in ("v", "k", "kv"):
            single = cacheblend_rows(naive, segments, caches, count, variant=variant)
            assert len(single) == count
            gradual = cacheblend_gradual_rows(naive, segments, caches, [total, count], variant=variant)
            assert gradual[:3] == from_layer_two(naive, segments, single)[:3]
            assert gradual[2:] == [single] * 3


@pytest.mark.parametrize("variant", ["v", "k"])
def test_gradual_filtering_layer_by_layer(naive, case, variant):
    segments, caches = case
    context = context_positions(segments)
    counts = [len(context), 6, 5, 2, 0]
    schedule = cacheblend_gradual_rows(naive, segments, caches, counts, variant=variant)
    assert [len(rows) for rows in schedule] == [len(context), len(context), 6, 5, 2]
    run = run_with_schedule(naive, segments, caches, schedule)
    assert run.charged == 2 * len(context) + 6 + 5 + 2
    stale = dict(zip("kv", naive.assemble(segments, caches), strict=True))[variant]
    merged = {"k": run.keys, "v": run.values}[variant]
    for layer in range(LAYERS):
        moved = ((merged[layer] - stale[layer]) ** 2).sum((0, 2))
        rest = sorted(set(context) - set(schedule[layer]))
        assert not moved[rest].any()  # dropped before this layer: stale, exactly
        if layer in (1, 2, 3):
            kept = schedule[layer + 1]
            dropped = sorted(set(schedule[layer]) - set(kept))
            assert moved[kept].min() >= moved[dropped].max()
            if not first_chunk_is_exact(segments, PREFIX):
                assert moved[dropped].min() > 0  # dropped after this layer: still fresh in it
    assert schedule[2] == cacheblend_rows(naive, segments, caches, 6, variant=variant)


def test_scores_are_zero_in_an_exact_first_chunk_and_nowhere_else(naive, case):
    segments, caches = case
    first = len(segments[1][0]) if first_chunk_is_exact(segments, PREFIX) else 0
    for variant in ("v", "k", "kv"):
        scores = cacheblend_scores(naive, segments, caches, variant=variant)
        assert scores[:first].max(initial=0) < 1e-20
        assert scores[first:].min() > 1e-8
    scores = kvshare_scores(naive, segments, caches)
    assert scores[:first].max(initial=0) < 1e-10
    assert scores[first:].min() > 1e-8


def test_cacheblend_scores_are_distances_to_the_full_prefill(naive, case):
    """And for K it does not matter whether it is compared before or after rotation."""
    segments, caches = case
    context = context_positions(segments)
    _, keys, values = naive.full_prefill(prompt_ids(segments))
    stale_keys, stale_values = naive.assemble(segments, caches)
    _close(
        cacheblend_scores(naive, segments, caches), ((values[1] - stale_values[1])[:, context] ** 2).sum((0, 2)), 1e-8
    )
    by_keys = cacheblend_scores(naive, segments, caches, variant="k")
    _close(by_keys, ((keys[1] - stale_keys[1])[:, context] ** 2).sum((0, 2)), 1e-8)
    unrotated, _ = naive.encode_chunk([], prompt_ids(segments))
    stored = np.concatenate([cache[0][1] for cache in caches], axis=1)
    _close(by_keys, ((unrotated[1][:, context] - stored) ** 2).sum((0, 2)), 1e-8)


@pytest.mark.parametrize("shape", ["gqa", "llama3", "yarn"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_kvshare_scores_are_transformers_attention_weights(shape, prompt):
    model, segments = oracle_llama(shape), PROMPTS[prompt]
    naive, context = naive_of(model), context_positions(segments)
    caches = _encode(naive, segments)
    full = transformers_pass(model, prompt_ids(segments))
    moved = np.abs(full.values[1] - naive.assemble(segments, caches)[1][1]).sum((0, 2))
    for attending in (None, suffix_positions(segments), sorted({*context, *suffix_positions(segments)})):
        rows = range(len(prompt_ids(segments))) if attending is None else attending
        received = full.attentions[1][:, list(rows)].sum(1).mean(0)
        got = kvshare_scores(naive, segments, caches, attending=attending)
        want = (received * moved)[context]
        _close(got / want.max(), want / want.max(), 1e-5)  # transformers' RoPE and softmax are float32


def test_ties_go_to_the_lower_position():
    assert rivals._best([3, 4, 5, 7], [2.0, 2.0, 2.0, 1.0], 2) == [3, 4]
    assert rivals._best([3, 5, 7], [0.0, 0.0, 1.0], 2) == [3, 7]
    with pytest.raises(ValueError, match="count is 4"):
        rivals._best([3, 5, 7], [0.0, 0.0, 1.0], 4)


def test_bad_schedules_are_refused(naive):
    segments = PROMPTS["no_prefix"]
    caches = _encode(naive, segments)
    with pytest.raises(ValueError, match="come back"):
        run_with_schedule(naive, segments, caches, [[0, 1], [0], [0, 1], [0], [0]])
    with pytest.raises(ValueError, match="each of the 5"):
        run_with_schedule(naive, segments, caches, [[0]])
    with pytest.raises(ValueError, match="only chunk tokens"):
        run_with_schedule(naive, segments, caches, in_all_layers(naive, [11]))
    with pytest.raises(ValueError, match="never grow"):
        cacheblend_gradual_rows(naive, segments, caches, [11, 3, 4])
    with pytest.raises(ValueError, match="start with all"):
        cacheblend_gradual_rows(naive, segments, caches, [10, 3])


def test_the_reference_stands_apart():
    tree = ast.parse(Path(rivals.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name for name in modules if name.startswith("tests")} == {
        "tests.reuse.naive.llama_reference",
        "tests.reuse.naive.prompt_reference",
    }
    assert "torch" not in modules
    assert not any(name.startswith(("prophetkv_rag", "transformers")) for name in modules)
