"""The memory of answered prompts by itself, and conversations of models whose layers see a window only."""

from __future__ import annotations

from prophetkv_rag.integrations.vllm.turns import ChunkRows, Former, Turns
from tests.tiny import tiny_tokenizer
from tests.vllm.serving import Served, reuse, tokens
from tests.vllm.test_conversations import (
    BLOCK,
    CHUNKS,
    continued,
    first_turn,
    held_blocks,
    rows_of_the_first_turn,
    two_turns,
)
from tests.vllm.test_models import MODELS

ROWS = (ChunkRows("key", 3, 60, 0, (), 1),)


def chain(ids, salt=b""):
    return [b"%r" % (ids[: (n + 1) * 4],) + salt for n in range(len(ids) // 4)]


def test_memory_of_turns_is_bounded_and_the_longest_is_found():
    turns = Turns(4, most_hashes=10)
    ids = list(range(30))
    turns.keep("s", chain(ids[:9]), ids[:9], ROWS, [b"a"] * 3)
    turns.keep("s", chain(ids[:18]), ids[:18], ROWS, [b"b"] * 5)
    assert turns.find("s", chain(ids), ids, ROWS) == Former((b"b",) * 5, 4)
    assert turns.find("s", chain(ids[:17]), ids[:17], ROWS) == Former((b"a",) * 3, 2)
    assert turns.find("other", chain(ids), ids, ROWS) == Former()
    assert turns.find("s", chain(ids, b"tenant"), ids, ROWS) == Former()
    assert turns.find("s", chain(ids), ids, (ChunkRows("key", 3, 60, 0, (), 2),)) == Former()
    assert turns.find("s", chain(ids[:8]), ids[:8], ROWS) == Former()
    turns.keep("s", chain(ids), ids, ROWS, [b"c"] * 4)  # the first was used last
    assert len(turns) == 2
    assert turns.find("s", chain(ids[:29]), ids[:29], ROWS) == Former((b"a",) * 3, 2)


def test_new_chunks_behind_a_sliding_window_are_computed(tmp_path):
    """vLLM gives the rows before the window away as soon as ours are allocated, so nothing is read there."""
    MODELS["mistral-window"]().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    served = Served(tmp_path / "model", tmp_path / "caches", block_size=BLOCK)
    try:
        served.register(CHUNKS)
        for ratio in (0.25, 1.0):
            answer, second, output = two_turns(served, CHUNKS[3], options={"recompute_ratio": ratio})
            held = reuse(output)["remembered_tokens"]
            assert held >= held_blocks(first_turn(served), answer) - 2 * BLOCK  # vLLM finds less where a window ends
            assert reuse(output)["status"] == "prefix_cache"
            rows = rows_of_the_first_turn(served, answer, held, recompute_ratio=ratio)
            assert tokens(output) == continued(served, rows, second)
        (plain,) = served.run([second], [{"enabled": False}])
        assert tokens(output) == tokens(plain)
    finally:
        served.close()
