"""What a prompt begins with as the encoding prefix begins is copied, not computed; nothing else changes."""

from __future__ import annotations

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from tests.tiny import tiny_llama

KNOWN = (3, 4, 5, 6, 7)
CHUNKS = [list(range(20, 50)), list(range(60, 85))]
SUFFIX = [90, 91, 92]
LAYERS = 3
MODEL = tiny_llama(num_hidden_layers=LAYERS, initializer_range=0.2)

PREFIXES = [
    ((3, 4, 5, 6, 7), 5),
    ((3, 4, 5, 6, 7, 8, 9), 5),  # the prompt goes on
    ((3, 4, 5), 3),  # the encoding prefix goes on, by a lead-in
    ((3, 4, 9, 6, 7), 2),
    ((9, 4, 5, 6, 7), 0),
    ((), 0),
]


def engine_of(**settings):
    engine = ProphetKVEngine(MODEL, None, config=ProphetKVConfig(encoding_prefix=KNOWN, **settings))
    engine.add_chunks(CHUNKS)
    return engine


@pytest.mark.parametrize("strategy", ["prophetkv", "full_reuse", "cacheblend", "epic"])
@pytest.mark.parametrize(("prefix", "known"), PREFIXES)
def test_known_rows_are_right_and_not_run(prefix, known, strategy, monkeypatch):
    engine = engine_of()
    prompt = Prompt(prefix, CHUNKS, SUFFIX, glue=[95])
    full = engine.prefill(prompt, strategy="full_prefill")
    ran = []
    decoder_layer = type(MODEL.model.layers[0])
    forward = decoder_layer.forward
    monkeypatch.setattr(
        decoder_layer,
        "forward",
        lambda self, hidden, *a, **k: ran.append(hidden.shape[1]) or forward(self, hidden, *a, **k),
    )
    result = engine.prefill(prompt, strategy=strategy, recompute_ratio=0.2)
    assert engine.read(prompt).known_prefix == known
    for ours, theirs in zip(result.past_key_values.layers, full.past_key_values.layers, strict=True):
        rows = slice(0, len(prefix))
        torch.testing.assert_close(ours.keys[:, :, rows], theirs.keys[:, :, rows], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values[:, :, rows], theirs.values[:, :, rows], atol=1e-5, rtol=1e-5)
    assert result.report.row_layers == sum(ran)
    if strategy == "full_reuse":  # then nothing but the unknown tokens outside the chunks runs
        assert sum(ran) == (len(prefix) - known + 1 + len(SUFFIX)) * LAYERS
        assert result.report.charged_ratio == 0.0


@pytest.mark.parametrize(("prefix", "known"), PREFIXES)
def test_the_choice_is_the_same_as_with_a_computed_prefix(prefix, known):
    prompt = Prompt(prefix, CHUNKS, SUFFIX)
    engine = engine_of()
    copied = engine.prefill(prompt, recompute_ratio=0.3)
    engine.library.prefix = None  # as of an engine that keeps no rows of its prefix
    layout = engine.read(prompt)
    monkeypatched = type(layout)(layout.input_ids, layout.chunks)
    engine._reader.read = lambda *a, **k: monkeypatched
    computed = engine.prefill(prompt, recompute_ratio=0.3)
    assert torch.equal(copied.recomputed, computed.recomputed)
    torch.testing.assert_close(copied.logits, computed.logits, atol=1e-5, rtol=1e-5)
    assert computed.report.row_layers - copied.report.row_layers == known * LAYERS
    assert computed.report.charged_ratio == pytest.approx(copied.report.charged_ratio)


def test_ratio_one_is_full_prefill():
    engine = engine_of()
    for prefix, _ in PREFIXES:
        prompt = Prompt(prefix, CHUNKS, SUFFIX)
        full = engine.prefill(prompt, strategy="full_prefill")
        ours = engine.prefill(prompt, recompute_ratio=1.0)
        torch.testing.assert_close(ours.logits, full.logits, atol=1e-4, rtol=1e-4)
