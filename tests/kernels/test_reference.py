"""The PyTorch operations against explicit loops in float64, on awkward shapes."""

from __future__ import annotations

import math

import pytest
import torch

from prophetkv_rag.kernels import ops, row_blocks
from prophetkv_rag.kernels.reference import attention

SHAPES = [  # heads, kv heads, rows, keys, head dim
    (4, 4, 1, 1, 8),
    (4, 2, 7, 33, 16),
    (8, 1, 61, 200, 64),
    (9, 3, 130, 517, 64),
    (14, 2, 50, 90, 40),
]


def make(shape, seed=0, span=None):
    """Random states, and rows among the keys; with `span` the keys stand at some of so many positions."""
    heads, kv_heads, rows, keys, dim = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(heads, rows, dim, generator=generator)
    key = torch.randn(kv_heads, keys, dim, generator=generator)
    value = torch.randn(kv_heads, keys, dim, generator=generator)
    positions = torch.randperm(keys, generator=generator)[:rows].sort().values
    if span is None:
        return query, key, value, positions
    places = torch.randperm(span, generator=generator)[:keys].sort().values
    return query, key, value, places[positions], places


def weights_by_loop(query, key, positions, head, row, *, window, hidden, softcap, sink, scaling, places=None):
    """float64 softmax weights of one row of one head over all keys, which stand at `places`."""
    kv_head = head // (query.shape[0] // key.shape[0])
    position = int(positions[row])
    logits = []
    for index in range(key.shape[1]):
        place = index if places is None else int(places[index])
        visible = place <= position and (window is None or place > position - window)
        if not visible or (hidden is not None and hidden[index]):
            logits.append(-math.inf)
            continue
        logit = float(query[head, row].double() @ key[kv_head, index].double()) * scaling
        logits.append(softcap * math.tanh(logit / softcap) if softcap else logit)
    if sink is not None:
        logits.append(float(sink))
    weights = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=0)
    return weights[: key.shape[1]], kv_head


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 3.0}, {"sinks": True}, {"hidden": True}], ids=str)
def test_attention_and_scores(shape, options):
    query, key, value, positions = make(shape)
    heads, rows = query.shape[:2]
    num_keys = key.shape[1]
    sinks = torch.linspace(-1, 2, heads) if options.get("sinks") else None
    hidden = None
    if options.get("hidden"):
        hidden = torch.zeros(num_keys, dtype=torch.bool)
        hidden[::3] = True
        hidden[positions] = False
    scaling, window, softcap = 0.17, options.get("window"), options.get("softcap")
    context = torch.arange(num_keys) % 4 != 1
    asking = torch.arange(rows) % 2 == 0

    expected = torch.zeros(rows, heads, value.shape[-1], dtype=torch.float64)
    mass = {True: torch.zeros(num_keys, dtype=torch.float64), False: torch.zeros(num_keys, dtype=torch.float64)}
    for head in range(heads):
        for row in range(rows):
            weights, kv_head = weights_by_loop(
                query, key, positions, head, row,
                window=window, hidden=hidden, softcap=softcap, sink=None if sinks is None else sinks[head],
                scaling=scaling,
            )  # fmt: skip
            expected[row, head] = weights @ value[kv_head].double()
            if asking[row]:
                inside = weights * context
                mass[False] += inside / (heads * int(asking.sum()))
                if inside.sum() > 0:
                    mass[True] += inside / inside.sum() / (heads * int(asking.sum()))

    blocks = ops.RowBlocks(positions, num_groups=heads // key.shape[0], sliding_window=window, hidden_keys=hidden)
    settings = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    output = ops.selected_rows_attention(query, key, value, blocks, **settings)
    torch.testing.assert_close(output.double(), expected, atol=2e-5, rtol=2e-5)
    for context_softmax in (True, False):
        total = torch.zeros(key.shape[0], num_keys)
        output = ops.attend_and_score(
            query, key, value, blocks, mass=total,
            context=context, scoring_rows=asking, context_softmax=context_softmax, **settings,
        )  # fmt: skip
        torch.testing.assert_close(output.double(), expected, atol=2e-5, rtol=2e-5)
        scores = total.sum(0).double() / (heads * int(asking.sum()))
        torch.testing.assert_close(scores, mass[context_softmax], atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize("joined", [True, False])
def test_plain_and_masked_keys_are_joined(monkeypatch, joined):
    """Small blocks, so that most keys of most blocks are read without a mask; and without the kernel that can."""
    monkeypatch.setattr(row_blocks, "MIN_PLAIN_KEYS", 8)
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 32)
    if not joined:
        monkeypatch.setattr(attention, "_flash_cpu", lambda: None)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
        query, key, value, positions = (
            tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in make((4, 2, 70, 200, 16))
        )
        key[:, :60] *= 3  # so that neither part of the softmax is negligible
        blocks = ops.RowBlocks(positions, num_groups=2)
        assert sum(block.plain.stop - block.plain.start > 0 for block in blocks) > 2
        output = ops.selected_rows_attention(query, key, value, blocks, scaling=0.4)
        for head in range(4):
            for row in range(70):
                weights, kv_head = weights_by_loop(
                    query, key, positions, head, row, window=None, hidden=None, softcap=None, sink=None, scaling=0.4
                )
                expected = weights @ value[kv_head].double()
                torch.testing.assert_close(output[row, head].double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 30, 10_000])
@pytest.mark.parametrize("plain_keys", [8, 256])
def test_gathered_keys_are_seen_by_their_positions(monkeypatch, window, plain_keys):
    """Some keys of a longer cache, side by side: who sees whom is said by positions, in whole and in joined parts."""
    monkeypatch.setattr(row_blocks, "MIN_PLAIN_KEYS", plain_keys)
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 32)
    query, key, value, positions, places = make((4, 2, 70, 200, 16), span=900)
    blocks = ops.RowBlocks(positions, num_groups=2, sliding_window=window, key_positions=places)
    assert any(block.plain.stop > block.plain.start for block in blocks) == (window != 30 and plain_keys == 8)
    output = ops.selected_rows_attention(query, key, value, blocks, scaling=0.4)
    for head in range(4):
        for row in range(70):
            weights, kv_head = weights_by_loop(
                query, key, positions, head, row,
                window=window, hidden=None, softcap=None, sink=None, scaling=0.4, places=places,
            )  # fmt: skip
            expected = weights @ value[kv_head].double()
            torch.testing.assert_close(output[row, head].double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("window", [None, 30])
def test_all_keys_gathered_are_the_cache(window):
    """Bit for bit, blocks and masks included."""
    query, key, value, positions = make((4, 2, 70, 600, 16))
    plain, gathered = (
        ops.RowBlocks(positions, num_groups=2, sliding_window=window, key_positions=places)
        for places in (None, torch.arange(600))
    )
    for one, other in zip(plain, gathered, strict=True):
        assert (one.rows, one.plain, one.masked) == (other.rows, other.plain, other.masked)
        assert torch.equal(one.mask, other.mask)
    found = [ops.selected_rows_attention(query, key, value, blocks, scaling=0.4) for blocks in (plain, gathered)]
    assert torch.equal(*found)


def test_masks_beyond_the_cache_are_made_again(monkeypatch):
    query, key, value, positions = make((9, 3, 130, 517, 64))
    roomy = ops.selected_rows_attention(query, key, value, ops.RowBlocks(positions, num_groups=3), scaling=0.1)
    monkeypatch.setattr(row_blocks, "MASK_CACHE_BYTES", 0)
    blocks = ops.RowBlocks(positions, num_groups=3)
    assert torch.equal(ops.selected_rows_attention(query, key, value, blocks, scaling=0.1), roomy)


def test_a_row_that_sees_no_context_scores_nothing():
    query, key, value, _ = make((2, 2, 1, 40, 8))
    context = torch.arange(40) < 10
    scores = torch.zeros(2, 40)
    ops.attend_and_score(
        query, key, value, ops.RowBlocks(torch.tensor([39]), num_groups=1, sliding_window=4), mass=scores,
        context=context, scoring_rows=torch.tensor([True]), context_softmax=True, scaling=1.0,
    )  # fmt: skip
    assert float(scores.abs().max()) == 0.0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "rotary"), [(8, 8), (16, 6), (64, 64), (80, 32)])
def test_rotate(head_dim, rotary, interleaved, dtype):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 5, head_dim, generator=generator).to(dtype)
    angles = torch.rand(5, rotary // 2, generator=generator, dtype=torch.float64) * 6
    rotated = ops.rotate(states, angles.cos().float(), angles.sin().float(), interleaved=interleaved)
    expected = states.double().clone()
    for row in range(5):
        for pair in range(rotary // 2):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary // 2)
            turn = complex(math.cos(angles[row, pair]), math.sin(angles[row, pair]))
            turned = torch.complex(states[..., row, a].double(), states[..., row, b].double()) * turn
            expected[..., row, a], expected[..., row, b] = turned.real, turned.imag
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(rotated.double(), expected, atol=tolerance, rtol=tolerance)
    assert rotated.dtype == dtype
