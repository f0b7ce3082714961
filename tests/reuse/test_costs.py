"""What a query costs, counted instead of timed: no copy of the cache in stage II, no operation per context token."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.reuse import prefill as prefill_module
from tests.tiny import tiny_llama

HEADS, HEAD_DIM, VOCAB = 2, 64, 97
SUFFIX = [90, 91, 92]
MODEL = tiny_llama(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=HEADS,
    head_dim=HEAD_DIM,
    max_position_embeddings=8192,
)


class Operations(TorchDispatchMode):
    """Counts operations, and the elements of the largest tensor that one of them made (views are not made)."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.count += 1
        is_new = not any(result.alias_info for result in func._schema.returns)
        if is_new:
            tensors = [made] if isinstance(made, torch.Tensor) else made if isinstance(made, (tuple, list)) else []
            self.largest = max([self.largest, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return made


def stage_two(context_tokens, num_rows, monkeypatch):
    """Run one query with `num_rows` recomputed and return what its stage II did."""
    engine = ProphetKVEngine(MODEL, None, config=ProphetKVConfig(encoding_prefix=(3, 4, 5)))
    chunks = [[20 + (start + i) % 60 for i in range(200)] for start in range(0, context_tokens, 200)]
    engine.add_chunks(chunks)
    counted = Operations()
    recompute = prefill_module.recompute_rows

    def counting(*args, **kwargs):
        with counted:
            return recompute(*args, **kwargs)

    monkeypatch.setattr(prefill_module, "recompute_rows", counting)
    result = engine.prefill(Prompt([3, 4, 5], chunks, SUFFIX), recompute_ratio=num_rows / context_tokens + 1e-9)
    monkeypatch.undo()
    assert result.report.recomputed_tokens == num_rows
    assert result.report.row_layers == (len(SUFFIX) + len(SUFFIX) + num_rows) * 3
    return counted


def test_stage_two_makes_nothing_as_large_as_the_cache(monkeypatch):
    counted = stage_two(4000, 20, monkeypatch)
    assert 0 < counted.largest < HEADS * 4000 * HEAD_DIM / 2  # the rows' mask is about a third


def test_the_number_of_operations_does_not_grow_with_the_context(monkeypatch):
    short, long = stage_two(1000, 40, monkeypatch), stage_two(4000, 40, monkeypatch)
    # A row block is attended to in one part or, with many keys before it, in two.
    assert long.count <= short.count + 3 * 12


@pytest.mark.parametrize("strategy", ["full_prefill", "prophetkv"])
def test_the_clock_is_read_after_the_device_has_finished(monkeypatch, strategy):
    """By a clock that only the waiting moves: what a GPU does meanwhile belongs to the time of the first token."""
    waited = []
    monkeypatch.setattr(time, "perf_counter", lambda: float(sum(waited)))
    monkeypatch.setattr(prefill_module, "_settled", lambda logits: waited.append(7) or logits)
    engine = ProphetKVEngine(MODEL, None, config=ProphetKVConfig(encoding_prefix=(3, 4, 5)))
    chunks = [[20 + (start + i) % 60 for i in range(20)] for start in (0, 200)]
    engine.add_chunks(chunks)
    timings = engine.prefill(Prompt([3, 4, 5], chunks, SUFFIX), strategy=strategy).report.timings_s
    assert (timings.ttft, timings.recompute) == (7.0, 7.0)
