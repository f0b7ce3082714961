"""Caches behind other chunks, and second caches, over time: computed when they are wanted, gone with what they show."""

from __future__ import annotations

import pytest

from prophetkv_rag.integrations.vllm.identity import opening_of
from tests.tiny import save_tiny, text_of
from tests.vllm.serving import Served, reuse, tokens
from tests.vllm.test_encodings import DOCUMENT, ORDERS, key_of, prompts, stored
from tests.vllm.test_models import SHAPE


@pytest.fixture
def served(tmp_path):
    served = Served(save_tiny(tmp_path / "model", **SHAPE), tmp_path / "caches", block_size=32)
    yield served
    served.close()


def test_a_second_cache_is_computed_by_the_first_prompt_that_wants_it(served):
    served.register(DOCUMENT, in_order=True)
    ids = [served.ids(one) for one in prompts()]

    def statuses(**options):
        served.forget_prefixes()
        return [[c["status"] for c in reuse(output)["chunks"]] for output in served.run(ids[:1], [options])]

    assert statuses(recompute_ratio=1.0) == [["hit"] * 4]  # all of it is computed anyway
    assert statuses(first_chunk="cached") == [["hit"] * 4]
    assert statuses() == [["miss", "hit", "hit", "hit"]]
    assert statuses() == [["hit"] * 4]
    store, identity = served.planner._store, opening_of(served.planner._identity)
    second = identity.key(served.engine.library.tokens.chunk(DOCUMENT[ORDERS[0][0]]))
    assert second in store
    store.delete([key_of(served, DOCUMENT[ORDERS[0][0]])])  # what is kept with a chunk goes with it
    assert second not in store


def test_what_is_deleted_leaves_no_trace(served):
    """Caches that bear its trace are gone; the next prompt has them computed without it, as our engine does."""
    keys = served.register(DOCUMENT, in_order=True)
    asked = prompts()[1]  # begins with the document's first chunk, which will be deleted
    before = served.answers([asked])
    assert before == [served.engine_answer(asked)]
    served.planner._store.delete(keys[:1])
    assert [key in served.planner._store for key in keys] == [False] * 5
    served.engine.remove_chunks([served.engine.key_of(DOCUMENT[0])])
    # vLLM's prefix cache holds the former rows; the prompt has other chunks now, and others of the same keys.
    (output,) = served.run([served.ids(asked)], [{}])
    ours = served.engine.prefill(asked).report
    assert tokens(output) == served.engine_answer(asked)
    assert reuse(output)["status"] == "reused"
    assert len(reuse(output)["chunks"]) == 3 == len(ours.chunks)
    assert all(not set(stored(served, key).behind.traces) & set(keys[:1]) for key in keys[1:4])
    # The deleted one again: the same chunks in the same order, and still nothing of the former rows.
    served.register(DOCUMENT[:1])
    (output,) = served.run([served.ids(asked)], [{}])
    assert reuse(output)["status"] == "reused"
    assert tokens(output) == served.engine_answer(asked)


def test_order_that_becomes_known_later_has_chunks_encoded_anew(served):
    served.register(DOCUMENT[:3])
    keys = served.register(DOCUMENT[:3], in_order=True)
    assert [len(stored(served, key).behind.keys) for key in keys] == [0, 1, 2]
    asked = [{"role": "user", "content": "\n\n".join([*DOCUMENT[2::-1], text_of(8, seed=9)])}]
    assert served.answers([asked]) == [served.engine_answer(asked)]
