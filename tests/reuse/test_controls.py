"""The controls that the product stands on, in fp32, for every family that the probe accepts.

Reference is the model's own full prefill, run by plain transformers on the same token ids. Chunks, glue and suffix are
longer than the sliding windows (16), so that windows matter.
"""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.model import cache_argument
from tests import families

TOLERANCE = 1e-4
ENCODING_PREFIX = (3, 1, 4, 1, 5)
NUM_PREFIX = len(ENCODING_PREFIX)


def draw(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, families.VOCAB_SIZE, (count,), generator=generator).tolist()


CHUNKS = [draw(20, 1), draw(17, 2), draw(23, 3)]
GLUE = draw(3, 4)
SUFFIX = draw(9, 5)
PROMPT = Prompt(ENCODING_PREFIX, CHUNKS, SUFFIX, glue=GLUE)


@pytest.fixture(scope="module", params=families.SUPPORTED)
def family(request):
    model = families.SUPPORTED[request.param]()
    engine = ProphetKVEngine(model, None, config=ProphetKVConfig(encoding_prefix=ENCODING_PREFIX))
    engine.add_chunks(CHUNKS)
    return engine


def own_prefill(model, input_ids):
    """Full prefill by plain transformers, every row kept also in layers with a sliding window."""
    cache = DynamicCache()
    with torch.no_grad():
        logits = model(input_ids, **cache_argument(model, cache), use_cache=True).logits[:, -1]
    return logits, cache.layers


def assert_rows_close(actual, expected, rows=slice(None)):
    for index, (own, other) in enumerate(zip(actual, expected, strict=True)):
        for name in ("keys", "values"):
            torch.testing.assert_close(
                getattr(own, name)[:, :, rows],
                getattr(other, name)[:, :, rows],
                atol=TOLERANCE,
                rtol=TOLERANCE,
                msg=lambda text, layer=index, name=name: f"layer {layer} {name}: {text}",
            )


def test_ratio_one_is_full_prefill(family):
    result = family.prefill(PROMPT, recompute_ratio=1.0)
    logits, layers = own_prefill(family.model, result.input_ids)
    torch.testing.assert_close(result.logits, logits, atol=TOLERANCE, rtol=TOLERANCE)
    assert_rows_close(result.past_key_values.layers, layers)
    assert result.report.recomputed_tokens == sum(map(len, CHUNKS))


def test_first_chunk_behind_the_encoding_prefix_is_exact(family):
    result = family.prefill(PROMPT, recompute_ratio=0.0)
    _, layers = own_prefill(family.model, result.input_ids)
    assert_rows_close(result.past_key_values.layers, layers, slice(0, NUM_PREFIX + len(CHUNKS[0])))
    # and the second one is not: otherwise this test could not fail
    second = slice(NUM_PREFIX + len(CHUNKS[0]) + len(GLUE), NUM_PREFIX + len(CHUNKS[0]) + len(GLUE) + len(CHUNKS[1]))
    stale = result.past_key_values.layers[-1].values[:, :, second] - layers[-1].values[:, :, second]
    assert float(stale.abs().max()) > 100 * TOLERANCE


def test_ratio_zero_is_full_reuse(family):
    zero = family.prefill(PROMPT, recompute_ratio=0.0)
    reuse = family.prefill(PROMPT, strategy="full_reuse")
    assert torch.equal(zero.logits, reuse.logits)
    assert zero.report.recomputed_tokens == reuse.report.recomputed_tokens == 0


def test_unselected_rows_are_untouched_and_sets_are_nested(family):
    stale = family.prefill(PROMPT, strategy="full_reuse").past_key_values.layers
    previous: set[int] = set()
    context = {p for p in range(len(PROMPT.prefix), len(PROMPT.prefix) + 66) if p not in {25, 26, 27, 45, 46, 47}}
    for ratio in (0.1, 0.3, 0.6, 0.9):
        result = family.prefill(PROMPT, strategy="prophetkv:first_chunk=cached", recompute_ratio=ratio)
        layers = result.past_key_values.layers
        changed = set()
        for own, old in zip(layers, stale, strict=True):
            for new_rows, old_rows in ((own.keys, old.keys), (own.values, old.values)):
                changed |= set((new_rows != old_rows).any(dim=(0, 1, 3)).nonzero()[:, 0].tolist()) & context
        # Rows whose recomputed value happens to be bitwise equal to the stale one (the exact first chunk) may not show.
        assert len(changed) <= result.report.recomputed_tokens == int(ratio * 60 + 1e-9)
        assert previous <= changed | set(range(NUM_PREFIX, NUM_PREFIX + len(CHUNKS[0])))
        previous = changed


def test_permuting_chunks_permutes_the_caches(family):
    order = [2, 0, 1]
    straight = family.prefill(PROMPT, strategy="full_reuse").past_key_values.layers
    swapped_prompt = Prompt(ENCODING_PREFIX, [CHUNKS[index] for index in order], SUFFIX, glue=GLUE)
    swapped = family.prefill(swapped_prompt, strategy="full_reuse").past_key_values.layers
    starts, swapped_starts = _starts([0, 1, 2]), _starts(order)
    for layer, found in enumerate(family.support.layers):
        for index, chunk in enumerate(CHUNKS):
            a, b, size = starts[index], swapped_starts[index], len(chunk)
            assert torch.equal(straight[layer].values[:, :, a : a + size], swapped[layer].values[:, :, b : b + size])
            keys, other = straight[layer].keys[:, :, a : a + size], swapped[layer].keys[:, :, b : b + size]
            if found.rotation is None:
                assert torch.equal(keys, other)
            elif a != b:
                moved = _shift(keys.double(), b - a, found.rotation)
                torch.testing.assert_close(moved.float(), other, atol=TOLERANCE, rtol=TOLERANCE)


def _starts(order):
    position, starts = NUM_PREFIX, {}
    for index in order:
        starts[index] = position
        position += len(CHUNKS[index]) + len(GLUE)
    return starts


def _shift(keys, delta, rotation):
    """Rotate by `delta` with complex numbers: another way than the code under test."""
    angles = torch.tensor(rotation.inv_freq, dtype=torch.float64) * delta
    turn, dim = torch.polar(torch.ones_like(angles), angles), rotation.rotary_dim
    first = keys[..., 0:dim:2] if rotation.interleaved else keys[..., : dim // 2]
    second = keys[..., 1:dim:2] if rotation.interleaved else keys[..., dim // 2 : dim]
    turned = torch.complex(first, second) * turn
    moved = keys.clone()
    if rotation.interleaved:
        moved[..., 0:dim:2], moved[..., 1:dim:2] = turned.real, turned.imag
    else:
        moved[..., : dim // 2], moved[..., dim // 2 : dim] = turned.real, turned.imag
    return moved


def test_generation_goes_on_by_plain_transformers(family):
    """`model.generate` accepts the cache; at ratio 1.0 its tokens are those of generation without any reuse."""
    result = family.prefill(PROMPT, recompute_ratio=1.0)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = family.model.generate(result.input_ids, **settings)
    actual = family.model.generate(**result.inputs, **settings)
    assert actual.tolist() == expected.tolist()
