"""Strategies that decide between layers: rows that go on are right, rows that drop out keep what they had."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.model import cache_argument
from prophetkv_rag.reuse.selection import Selection, Strategy
from tests import families

ENCODING_PREFIX = (3, 1, 4)
CHUNKS = [list(range(10, 30)), list(range(40, 57))]
PROMPT = Prompt(ENCODING_PREFIX, CHUNKS, [7, 8, 9, 6])
KEPT = [5, 9, 24, 31]


class FirstLayersInFull(Strategy):
    """All chunk tokens through the first layers, `KEPT` alone from then on."""

    name = "first_layers_in_full"

    def __init__(self, num_full: int) -> None:
        self.num_full = num_full
        self.seen = []

    def select(self, context):
        def prune(view):
            of_chunks = context.is_chunk[view.rows]
            self.seen.append((view.layer_idx, (view.fresh_keys - view.stale_keys)[:, of_chunks]))
            return torch.tensor(KEPT) if view.layer_idx == self.num_full - 1 else None

        return Selection(context.is_chunk.nonzero()[:, 0], prune=prune)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2", "gemma3_text", "cohere", "smollm3", "phi", "gpt_oss"])
def test_first_layers_in_full(name):
    model = families.SUPPORTED[name]()
    engine = ProphetKVEngine(model, None, config=ProphetKVConfig(encoding_prefix=ENCODING_PREFIX))
    engine.add_chunks(CHUNKS)
    strategy = FirstLayersInFull(2)
    result = engine.prefill(PROMPT, strategy=strategy)

    cache = DynamicCache()
    with torch.no_grad():
        model(result.input_ids, **cache_argument(model, cache), use_cache=True)
    stale = engine.prefill(PROMPT, strategy="full_reuse").past_key_values.layers
    num_tokens = result.input_ids.shape[1]
    dropped = [p for p in range(3, 40) if p not in KEPT]
    for index, layer in enumerate(result.past_key_values.layers):
        if index < 2:  # everything was computed: full prefill's rows
            torch.testing.assert_close(layer.keys, cache.layers[index].keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer.values, cache.layers[index].values, atol=1e-4, rtol=1e-4)
        else:  # rows that dropped out are the stale ones, bit by bit
            assert torch.equal(layer.keys[:, :, dropped], stale[index].keys[:, :, dropped])
            assert torch.equal(layer.values[:, :, dropped], stale[index].values[:, :, dropped])
    # Layer 2 gets its input from exact layers, so the rows that went on are exact there too.
    torch.testing.assert_close(
        result.past_key_values.layers[2].values[:, :, KEPT], cache.layers[2].values[:, :, KEPT], atol=1e-4, rtol=1e-4
    )
    num_layers = len(result.past_key_values.layers)
    run_anyway = num_tokens - 37 - len(ENCODING_PREFIX)  # the prompt's prefix is the encoding prefix: copied
    assert result.report.row_layers == 2 * (37 + run_anyway) + (num_layers - 2) * (len(KEPT) + run_anyway)
    assert [seen[0] for seen in strategy.seen] == list(range(num_layers - 1))
    assert float(strategy.seen[0][1].abs().max()) < 1e-4  # layer 0 never deviates
    assert float(strategy.seen[1][1].abs().max()) > 1e-2  # layer 1 does


def test_keeping_every_row_is_full_prefill():
    model = families.SUPPORTED["llama"]()
    engine = ProphetKVEngine(model, None, config=ProphetKVConfig(encoding_prefix=ENCODING_PREFIX))
    result = engine.prefill(PROMPT, strategy=FirstLayersInFull(99))
    expected = model(result.input_ids).logits[:, -1]
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=1e-4)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
