"""Several prompts' stages through one runner, as vLLM's workers run them: each as if it were alone."""

from __future__ import annotations

import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.model import RowsLayer
from prophetkv_rag.reuse import Assembly, ask_together, assemble_caches
from tests.tiny import tiny_llama

MODEL = tiny_llama()
CHUNKS = [[20 + (start + i) % 400 for i in range(30)] for start in (0, 100, 200)]


def contexts_of(engine, prompts):
    for prompt in prompts:
        layout = engine.read(prompt)
        caches = engine.library.load(layout).caches
        starts = [chunk.start for chunk in layout.chunks]
        given = {"dtype": torch.float32, "device": torch.device("cpu")}
        layers = assemble_caches(engine.support, caches, starts, layout.num_tokens, **given)
        yield engine.query_context(prompt, layers), Assembly(engine.support, caches, starts, layout.num_tokens, **given)


def test_stage_one_of_several_prompts_gives_each_its_own_scores():
    engine = ProphetKVEngine(MODEL, None, config=ProphetKVConfig(encoding_prefix=(3, 4, 5)))
    engine.add_chunks(CHUNKS)
    prompts = [Prompt([3, 4, 5], CHUNKS[first:], [7, 8, 9 + first]) for first in range(2)]
    together = [context for context, _ in contexts_of(engine, prompts)]
    ask_together(together)
    assert [context.row_layers > 0 for context in together] == [True, True]
    for context, (alone, _) in zip(together, contexts_of(engine, prompts), strict=True):
        torch.testing.assert_close(context.attention_scores(), alone.attention_scores())
        assert context.row_layers == alone.row_layers


def test_an_assembly_gives_its_layers_one_by_one():
    engine = ProphetKVEngine(MODEL, None, config=ProphetKVConfig(encoding_prefix=(3, 4, 5)))
    engine.add_chunks(CHUNKS)
    ((context, assembly),) = contexts_of(engine, [Prompt([3, 4, 5], CHUNKS, [7, 8])])
    for index, layer in enumerate(context.layers):
        assert isinstance(layer, RowsLayer)
        keys, values = assembly.layer(index)
        assert torch.equal(keys, layer.keys)
        assert torch.equal(values, layer.values)
