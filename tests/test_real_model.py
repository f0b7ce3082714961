"""The controls on a real model, SmolLM2-135M-Instruct, which `make model` fetches beforehand."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from prophetkv_rag import Prompt, ProphetKVEngine
from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.model import cache_argument
from prophetkv_rag.model.loading import load_model
from tests.reuse.naive.prompt_reference import context_positions
from tests.reuse.naive.transformers_oracle import reuse_as_one_pass

pytestmark = pytest.mark.model

TOLERANCE = 1e-4
CHUNKS = [
    "The superiority of the United States in munitions must be overwhelming. To increase our production rate of "
    "airplanes so rapidly that in this year, 1942, we shall produce 60,000 planes, ten thousand more than the goal "
    "that we set a year and a half ago. To increase our production rate of tanks so rapidly that in this year we "
    "shall produce 45,000 tanks.",
    "The library opens at nine o'clock on weekdays and at ten on Saturdays; its reading room holds forty thousand "
    "books, and the oldest of them, a herbal printed in Basel, was given by a fisherman's widow in 1788.",
    "First, I believe that this nation should commit itself to achieving the goal, before this decade is out, of "
    "landing a man on the moon and returning him safely to the earth. No single space project in this period will be "
    "more impressive to mankind, or more important for the long-range exploration of space.",
]
QUESTION = "How many planes shall be produced in 1942?"


@pytest.fixture(scope="module")
def engine():
    made = ProphetKVEngine.from_pretrained(fetch_default_model(), dtype=torch.float32)
    made.add_chunks(CHUNKS)
    return made


def messages(order=(0, 1, 2)):
    context = "\n\n".join(CHUNKS[index] for index in order)
    return [{"role": "user", "content": f"{context}\n\nAnswer in one sentence. {QUESTION}"}]


def own_prefill(engine, input_ids):
    cache = DynamicCache()
    with torch.no_grad():
        logits = engine.model(input_ids, **cache_argument(engine.model, cache), use_cache=True).logits[:, -1]
    return logits, cache.layers


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), atol=tolerance, rtol=tolerance)


def test_ratio_one_is_full_prefill(engine):
    result = engine.prefill(messages(), recompute_ratio=1.0)
    logits, layers = own_prefill(engine, result.input_ids)
    close(result.logits, logits)
    for ours, theirs in zip(result.past_key_values.layers, layers, strict=True):
        close(ours.keys, theirs.keys)
        close(ours.values, theirs.values)


def test_first_chunk_behind_the_encoding_prefix_is_exact(engine):
    result = engine.prefill(messages(), recompute_ratio=0.0)
    _, layers = own_prefill(engine, result.input_ids)
    stop = len(engine.identity.prefix_ids) + result.report.chunks[0].tokens
    for ours, theirs in zip(result.past_key_values.layers, layers, strict=True):
        close(ours.keys[:, :, :stop], theirs.keys[:, :, :stop])
        close(ours.values[:, :, :stop], theirs.values[:, :, :stop])


def test_ratio_zero_is_plain_reuse(engine):
    """Reference: chunk reuse written as one masked forward pass of transformers' own model, in float64."""
    prefix, suffix = list(engine.identity.prefix_ids), [198, 198, *engine.tokenizer("Why?")["input_ids"]]
    chunks = [engine.tokenizer(text)["input_ids"][:40] for text in CHUNKS]
    glue = engine.tokenizer("\n\n")["input_ids"]
    segments = [(prefix, False), (chunks[0], True), (glue, False), (chunks[1], True), (suffix, False)]
    result = engine.prefill(Prompt(prefix, chunks[:2], suffix, glue=glue), recompute_ratio=0.0)

    reference, _ = load_model(fetch_default_model(), dtype=torch.float64)
    reference.set_attn_implementation("eager")
    expected, positions, kinds = reuse_as_one_pass(reference, prefix, segments)
    close(result.logits[0], expected.logits[-1], 1e-3)
    rows = [row for row, kind in enumerate(kinds) if not isinstance(kind, int)]
    for layer, found in enumerate(result.past_key_values.layers):
        for row in rows:
            close(found.values[0, :, positions[row]], expected.values[layer][:, row], 1e-3)
    stale = [row for row, kind in enumerate(kinds) if isinstance(kind, int) and kind >= 0]
    assert [positions[row] for row in stale] == context_positions(segments)
    for layer, found in enumerate(result.past_key_values.layers):
        close(found.keys[0][:, context_positions(segments)], expected.keys[layer][:, stale], 1e-3)


def test_permuting_chunks_permutes_the_values(engine):
    def values_of(order):
        result = engine.prefill(messages(order), strategy="full_reuse")
        start: dict[int, tuple[int, int]] = {}
        ids = result.input_ids[0].tolist()
        for index in order:
            chunk = engine.tokenizer(CHUNKS[index])["input_ids"]
            position = next(p for p in range(len(ids)) if ids[p : p + len(chunk)] == chunk)
            start[index] = (position, len(chunk))
        return result.past_key_values.layers, start

    straight, at = values_of((0, 1, 2))
    swapped, elsewhere = values_of((2, 0, 1))
    for own, other in zip(straight, swapped, strict=True):
        for index, (position, length) in at.items():
            moved = elsewhere[index][0]
            assert torch.equal(
                own.values[:, :, position : position + length], other.values[:, :, moved : moved + length]
            )


def test_unselected_rows_are_untouched_and_sets_are_nested(engine):
    stale = engine.prefill(messages(), strategy="full_reuse").past_key_values.layers
    chunk_rows = range(len(engine.identity.prefix_ids), 10_000)
    previous = set()
    for ratio in (0.1, 0.2, 0.5):
        result = engine.prefill(messages(), recompute_ratio=ratio)
        changed = set()
        for own, old in zip(result.past_key_values.layers, stale, strict=True):
            differs = (own.values != old.values).any(dim=(0, 1, 3)) | (own.keys != old.keys).any(dim=(0, 1, 3))
            changed |= set(differs.nonzero()[:, 0].tolist())
        fresh = result.report.fresh_tokens
        assert len(changed & set(chunk_rows)) <= result.report.recomputed_tokens + fresh
        assert previous <= changed
        previous = changed


def test_answer_is_that_of_full_prefill(engine):
    answers = [
        engine.generate(messages((1, 0)), strategy=strategy, max_new_tokens=24).text
        for strategy in ("full_prefill", "prophetkv")
    ]
    assert answers[0] == answers[1] != ""
