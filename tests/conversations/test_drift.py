"""Messages that move every turn, in bfloat16: their keys are turned, and rounded, once, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from tests.conversations.test_moving import SAID, all_moves, history_of, messages
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

__all__ = ["all_moves"]

MOVES = 10
FIRST = CORPUS[:2]
CONTEXTS = [[CORPUS[(2 + move + step) % 6] for step in range(1 + move % 4)] for move in range(MOVES)]
HALF_AN_ULP = 2.0**-8
"""Of bfloat16, relative: the most that one rounding is off."""


def make_engine() -> ProphetKVEngine:
    model = tiny_llama(initializer_range=0.2).to(torch.bfloat16)
    engine = ProphetKVEngine(model, tiny_tokenizer(), config=ProphetKVConfig(encoding="plain"))
    engine.add_chunks(CORPUS[:6])
    return engine


def turn(engine: ProphetKVEngine, chunks: Any, number: int, **settings: Any) -> tuple[int, list[torch.Tensor]]:
    """Where the history stands, and its keys, layer by layer."""
    sent = messages(chunks, SAID, f"Question {number}: what was learned on Monday?")
    start, stop = history_of(engine, sent)
    result = engine.prefill(sent, remember=True, **({"recompute_ratio": 0.0} | settings))
    assert result.report.moved_tokens in ((stop - start) if number else 0, 0)
    return start, [layer.keys[0, :, start:stop].clone() for layer in result.past_key_values.layers]


def check(engine: ProphetKVEngine, before: list[torch.Tensor], after: list[torch.Tensor], shift: int) -> None:
    """Each key is the former one, rotated in float64 by this test's own arithmetic and rounded once."""
    for one, other, layer in zip(before, after, engine.support.layers, strict=True):
        assert layer.rotation is not None
        angles = shift * torch.tensor(layer.rotation.inv_freq, dtype=torch.float64)
        left, right = one.double().chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        expected = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
        error = (other.double() - expected).abs()
        assert bool((error <= HALF_AN_ULP * expected.abs() + 1e-6).all())


def moved(engine: ProphetKVEngine, first: int = 1) -> tuple[int, list[torch.Tensor]]:
    for number, chunks in enumerate(CONTEXTS[first - 1 :], first):
        start, keys = turn(engine, chunks, number)
    return start, keys


def test_ten_moves_are_one_rounding() -> None:
    engine = make_engine()
    begun, before = turn(engine, FIRST, 0)
    start, after = moved(engine)
    assert start != begun
    check(engine, before, after, start - begun)
    again, held = turn(engine, CONTEXTS[-1], MOVES + 1)  # the same context: taken over where they stand
    assert again == start
    assert all(torch.equal(one, other) for one, other in zip(held, after, strict=True))


def test_a_file_keeps_them_so(tmp_path: Path) -> None:
    engine, other = make_engine(), make_engine()
    begun, before = turn(engine, FIRST, 0)
    turn(engine, CONTEXTS[0], 1)
    engine.save_conversation(tmp_path / "chat")
    other.load_conversation(tmp_path / "chat")
    start, after = moved(other, first=2)
    check(engine, before, after, start - begun)


@pytest.mark.parametrize("middle", [2, 5])
def test_rows_that_were_computed_meanwhile_are_turned_from_where_they_were(middle: int) -> None:
    engine = make_engine()
    turn(engine, FIRST, 0)
    for number, chunks in enumerate(CONTEXTS[:middle], 1):
        turn(engine, chunks, number)
    begun, before = turn(engine, CONTEXTS[middle - 1], middle, strategy="full_prefill", recompute_ratio=None)
    start, after = moved(engine, first=middle + 1)
    check(engine, before, after, start - begun)
