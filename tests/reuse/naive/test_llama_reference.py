"""The naive reference against transformers' own Llama, float64: so that the engine may be judged by it.

transformers computes RoPE tables and RMSNorm in float32 even in a float64 model; the fixture `exact` takes that away.
"""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama

from tests.reuse.naive import llama_reference, prompt_reference
from tests.reuse.naive.llama_reference import NaiveLlama
from tests.reuse.naive.prompt_reference import context_positions, prompt_ids, select, suffix_positions
from tests.reuse.naive.transformers_oracle import (
    SHAPES,
    holders,
    naive_of,
    reuse_as_one_pass,
    tiny_llama,
    transformers_pass,
)

EXACT = 1e-9


@pytest.fixture
def exact(monkeypatch):
    def rms_norm(self, states):
        return self.weight * states / torch.sqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotary(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def softmax_in_float64(scores, dim, dtype):
        return scores.double().softmax(dim)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", rms_norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary)
    monkeypatch.setattr(modeling_llama.nn.functional, "softmax", softmax_in_float64)


def _ids(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 97, count)]


PREFIX = _ids(1, 4)
PROMPTS = {
    "glue": [
        (PREFIX, False),
        (_ids(2, 9), True),
        (_ids(3, 2), False),
        (_ids(4, 7), True),
        (_ids(5, 1), False),
        (_ids(6, 8), True),
        (_ids(7, 6), False),
    ],
    "no_glue": [(PREFIX, False), (_ids(2, 12), True), (_ids(4, 1), True), (_ids(6, 10), True), (_ids(7, 5), False)],
    "no_prefix": [(_ids(2, 9), True), (_ids(3, 3), False), (_ids(4, 11), True), (_ids(7, 4), False)],
    "one_chunk_last_row_only": [(_ids(8, 6), False), (_ids(2, 20), True), (_ids(7, 1), False)],
}


def _close(got, want, tolerance=EXACT):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=tolerance)


def _prompt(model, name, encoding_prefix=PREFIX):
    naive, segments = naive_of(model), PROMPTS[name]
    caches = [naive.encode_chunk(encoding_prefix, ids) for ids, is_chunk in segments if is_chunk]
    return naive, segments, caches


@pytest.mark.parametrize("shape", SHAPES)
def test_full_prefill_is_transformers_in_float64(shape, exact):
    model, ids = tiny_llama(shape), _ids(0, 40)
    logits, keys, values = naive_of(model).full_prefill(ids)
    want = transformers_pass(model, ids)
    assert np.abs(want.logits).max() > 1  # the numbers compared are not all tiny
    _close(logits, want.logits)
    _close(keys, want.keys)
    _close(values, want.values)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_prefill_is_transformers_as_it_is(shape):
    model, ids = tiny_llama(shape), _ids(0, 40)
    want = transformers_pass(model, ids)
    naives = [naive_of(model)]
    if model.config.rope_parameters["rope_type"] == "default":
        naives.append(NaiveLlama(model.state_dict(), model.config))  # its own inverse frequencies
    for naive in naives:
        logits, keys, values = naive.full_prefill(ids)
        _close(logits, want.logits, 5e-5)
        _close(keys, want.keys, 5e-5)
        _close(values, want.values, 5e-5)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("encoding_prefix", [PREFIX, []], ids=["behind_prefix", "alone"])
def test_plain_reuse_is_one_masked_pass(prompt, encoding_prefix, exact):
    model = tiny_llama("gqa")
    naive, segments, caches = _prompt(model, prompt, encoding_prefix)
    logits, keys, values = naive.plain_reuse(segments, caches)
    want, positions, kinds = reuse_as_one_pass(model, encoding_prefix, segments)
    _close(logits, want.logits[positions.index(len(prompt_ids(segments)) - 1)])
    columns = holders(segments, positions, kinds, selected=())
    for layer in range(3):
        _close(keys[layer], want.keys[layer][:, columns])
        _close(values[layer], want.values[layer][:, columns])


@pytest.mark.parametrize("shape", ["gqa", "yarn"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_recompute_is_one_masked_pass(prompt, shape, exact):
    model = tiny_llama(shape)
    naive, segments, caches = _prompt(model, prompt)
    selected = context_positions(segments)[1::3]
    logits, keys, values = naive.recompute(segments, caches, selected)
    want, positions, kinds = reuse_as_one_pass(model, PREFIX, segments, selected=set(selected))
    columns = holders(segments, positions, kinds, selected)
    _close(logits, want.logits[columns[-1]])
    for layer in range(3):
        _close(keys[layer], want.keys[layer][:, columns])
        _close(values[layer], want.values[layer][:, columns])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_recomputing_everything_is_full_prefill(prompt):
    naive, segments, caches = _prompt(tiny_llama("gqa"), prompt)
    logits, keys, values = naive.recompute(segments, caches, context_positions(segments))
    all_logits, all_keys, all_values = naive.full_prefill(prompt_ids(segments))
    _close(logits, all_logits[-1])
    _close(keys, all_keys)
    _close(values, all_values)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_recomputing_nothing_is_plain_reuse(prompt):
    naive, segments, caches = _prompt(tiny_llama("gqa"), prompt)
    for got, want in zip(naive.recompute(segments, caches, []), naive.plain_reuse(segments, caches), strict=True):
        _close(got, want)
    full = naive.full_prefill(prompt_ids(segments))[0][-1]
    if sum(is_chunk for _, is_chunk in segments) > 1:
        assert np.abs(naive.plain_reuse(segments, caches)[0] - full).max() > 1e-2  # reuse is no copy of full prefill


@pytest.mark.parametrize("shape", ["gqa", "llama3", "yarn"])
def test_the_first_chunk_behind_its_own_prefix_is_exact(shape):
    naive, segments, caches = _prompt(tiny_llama(shape), "no_glue")
    keys, values = naive.assemble(segments, caches)
    _, all_keys, all_values = naive.full_prefill(prompt_ids(segments))
    first = slice(len(PREFIX), len(PREFIX) + len(segments[1][0]))
    for layer in range(3):
        _close(keys[layer][:, first], all_keys[layer][:, first])
        _close(values[layer][:, first], all_values[layer][:, first])
        assert not keys[layer][:, : len(PREFIX)].any()
        assert not values[layer][:, suffix_positions(segments)].any()


def test_unselected_rows_stay_untouched():
    naive, segments, caches = _prompt(tiny_llama("gqa"), "glue")
    selected = context_positions(segments)[::4]
    rest = sorted(set(context_positions(segments)) - set(selected))
    stale_keys, stale_values = naive.assemble(segments, caches)
    _, keys, values = naive.recompute(segments, caches, selected)
    for layer in range(3):
        np.testing.assert_array_equal(keys[layer][:, rest], stale_keys[layer][:, rest])
        np.testing.assert_array_equal(values[layer][:, rest], stale_values[layer][:, rest])
        assert (keys[layer][:, selected] != stale_keys[layer][:, selected]).any() == (layer > 0)


@pytest.mark.parametrize("softmax", ["context", "full_row"])
@pytest.mark.parametrize("rows", ["suffix", "some", "extra"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_scores_are_transformers_attention_weights(prompt, rows, softmax, exact):
    model = tiny_llama("yarn")
    naive, segments, caches = _prompt(model, prompt)
    extra = _ids(9, 3) if rows == "extra" else []
    some = [-1, 0] if rows == "some" and len(suffix_positions(segments)) > 1 else "suffix"
    scores = naive.stage_one_scores(
        segments, caches, scoring_rows=some, softmax=softmax, extra_query_ids=extra if extra else None
    )
    one_pass, positions, kinds = reuse_as_one_pass(model, PREFIX, segments, glue=False, extra=extra)
    suffix, total = suffix_positions(segments), len(prompt_ids(segments))
    scoring = list(range(total, total + 3)) if extra else suffix if some == "suffix" else [suffix[i] for i in some]
    columns = [row for row, kind in enumerate(kinds) if kind != "fresh" and kind >= 0]
    want = np.zeros(len(columns))
    for attention in one_pass.attentions:
        weights = attention[:, [positions.index(row) for row in scoring]][..., columns]  # [heads, rows, C]
        want += (weights / weights.sum(-1, keepdims=True) if softmax == "context" else weights).mean((0, 1))
    _close(scores, want)
    assert scores.shape == (len(context_positions(segments)),)
    if softmax == "context":
        assert scores.sum() == pytest.approx(3)


def test_glue_is_invisible_in_stage_one():
    naive, segments, caches = _prompt(tiny_llama("gqa"), "glue")
    other = list(segments)
    other[2], other[4] = (_ids(50, 2), False), (_ids(51, 1), False)
    np.testing.assert_array_equal(naive.stage_one_scores(segments, caches), naive.stage_one_scores(other, caches))


def test_select_takes_the_floor_and_breaks_ties_by_position():
    scores = np.array([0.5, 0.1, 0.5, 0.5, 0.2])
    assert select(scores, 0.0) == []
    assert select(scores, 0.2) == [0]
    assert select(scores, 0.39) == [0]
    assert select(scores, 0.4) == [0, 2]
    assert select(scores, 0.8) == [0, 2, 3, 4]
    assert select(scores, 1.0) == [0, 1, 2, 3, 4]
    assert select(scores, 0.4, np.array([False, True, True, False, True])) == [2, 4]
    assert select(scores, 1.0, np.array([False, True, True, False, True])) == [1, 2, 4]
    assert select(scores, 0.4, positions=[7, 8, 9, 20, 21]) == [7, 9]
    assert len(select(np.arange(100.0), 0.29)) == 29  # 0.29 * 100 = 28.999999999999996


@pytest.mark.parametrize("num_tokens", [1, 5, 49, 100, 1000])
def test_select_has_no_float_noise(num_tokens):
    for wanted in range(num_tokens + 1):
        assert len(select(np.zeros(num_tokens), wanted / num_tokens)) == wanted


def test_bad_prompts_and_models_are_refused():
    model = tiny_llama("gqa")
    naive, segments, caches = _prompt(model, "no_glue")
    with pytest.raises(ValueError, match="behind the last one"):
        naive.plain_reuse(segments[:-1], caches)
    with pytest.raises(ValueError, match="more chunk caches"):
        naive.assemble(segments, [*caches, caches[0]])
    with pytest.raises(ValueError, match="only chunk tokens"):
        naive.recompute(segments, caches, [0])
    with pytest.raises(ValueError, match="biases"):
        NaiveLlama({**model.state_dict(), "x.bias": torch.zeros(1)}, model.config)
    with pytest.raises(ValueError, match="inv_freq"):
        NaiveLlama(model.state_dict(), tiny_llama("yarn").config)


def test_the_reference_stands_apart():
    for module in (llama_reference, prompt_reference):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in names} <= {
            "__future__",
            "collections",
            "math",
            "numpy",
            "tests",
            "typing",
        }
