"""The probe accepts exactly the models whose caches can be re-positioned exactly, and says why for the others."""

from __future__ import annotations

import pytest
import torch

from prophetkv_rag import UnsupportedModelError
from prophetkv_rag.model.probe import probe_model
from tests import families
from tests.tiny import tiny_llama

REASONS = {
    "gpt2": "learned absolute positions",
    "opt": "learned absolute positions",
    "bloom": "attention interface",
    "falcon": "attention interface",
    "mpt": "attention interface",
    "gptj": "attention interface|rotated by a known table",  # before transformers 5.24, and since
    "hunyuan_v1_dense": "keys at a new position",
    "deepseek_v3": "one row per token",
    "qwen3_next": "linear_attention layer",
    "mamba": "linear_attention layer",
    "lfm2": "conv layer",
    "gemma3n_text": "share the keys and values",
    "bert": "not a decoder-only",
    "t5": "not a decoder-only",
}


@pytest.mark.parametrize("name", families.REFUSED)
def test_refuses_with_the_reason(name):
    with pytest.raises(UnsupportedModelError, match=REASONS.get(name, "cannot be used")):
        probe_model(families.REFUSED[name]())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("phi3_longrope", "depend on the prompt's length"),
        ("llama4_chunked", "attends in chunks"),
        ("llama4_temperature", "scales its queries"),
    ],
)
def test_refuses_what_only_goes_wrong_at_length(name, reason):
    factory, _ = families.LENGTH_DEPENDENT[name]
    with pytest.raises(UnsupportedModelError, match=reason):
        probe_model(factory())


def test_dynamic_ntk_is_used_inside_its_window_only():
    factory, length = families.LENGTH_DEPENDENT["llama_dynamic"]
    assert probe_model(factory()).context_window == length


def _layers(name):
    return probe_model(families.SUPPORTED[name]()).layers


def test_finds_partial_and_interleaved_rotation():
    assert {layer.rope for layer in _layers("phi")} == {"half 8/16"}
    assert {layer.rope for layer in _layers("glm4")} == {"interleaved 8/16"}
    assert {layer.rope for layer in _layers("llama")} == {"half"}


def test_finds_layers_without_rope():
    assert [layer.rope for layer in _layers("smollm3")] == ["half", "half", "half", "none"]


def test_finds_windows_soft_capping_and_sinks():
    gemma2 = _layers("gemma2")
    assert [layer.sliding_window for layer in gemma2] == [16, None, 16, None]
    assert {layer.softcap for layer in gemma2} == {2.0}
    assert all(layer.has_sinks for layer in _layers("gpt_oss"))


def test_finds_two_frequency_tables_in_one_model():
    tables = {layer.rotation.inv_freq for layer in _layers("gemma3_text")}
    assert len(tables) == 2


def test_a_window_longer_than_the_context_is_no_window():
    model = families.build("mistral", sliding_window=4096)
    assert {layer.sliding_window for layer in probe_model(model).layers} == {None}


def test_model_is_left_as_it_was():
    model = tiny_llama()
    before = model.config._attn_implementation
    ids = torch.arange(20)[None]
    expected = model(ids).logits
    probe_model(model)
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids).logits, expected)


def test_a_wrong_rotation_is_noticed(monkeypatch):
    """If the frequency table that the model really uses is not among those it shows, nothing else may fit."""
    model = tiny_llama()
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def other_frequencies(x, position_ids):
        return forward(x, position_ids=position_ids * 1.001)

    monkeypatch.setattr(rotary, "forward", other_frequencies)
    with pytest.raises(UnsupportedModelError, match=r"rotated by a known table|fits near the start"):
        probe_model(model)
