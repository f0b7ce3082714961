"""`first_chunk="exact"`: a first chunk behind other words is computed whole, and then shared with whoever begins so."""

from __future__ import annotations

import pytest

from prophetkv_rag.config import BEHIND_RATIO
from prophetkv_rag.integrations.vllm.identity import open_identity
from prophetkv_rag.integrations.vllm.settings import ConnectorSettings
from prophetkv_rag.reuse import token_budget
from tests.tiny import save_tiny, text_of
from tests.vllm.serving import Served, reuse, tokens
from tests.vllm.test_conversations import BLOCK, CHUNKS, continued, filled_by_the_engine
from tests.vllm.test_models import SHAPE

DOCUMENT = [text_of(60, seed=seed) for seed in range(20, 24)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    model = save_tiny(directory / "model", **SHAPE)
    served = Served(model, directory / "caches", block_size=BLOCK, extra={"first_chunk": "exact"})
    served.register(CHUNKS)
    served.register(DOCUMENT, in_order=True)
    yield served
    served.close()


@pytest.fixture(autouse=True)
def _without_former_prompts(served):
    served.forget_prompts()


def prompt(served, *texts, rules="Read this.", number=0):
    text = "\n\n".join([rules, *texts, text_of(8, seed=number)])
    return served.ids([{"role": "user", "content": text}])


def first_stop(served, ids, text):
    chunk = served.engine.library.tokens.chunk(text)
    return next(at for at in range(len(ids)) if ids[at : at + len(chunk)] == chunk) + len(chunk)


def ends_a_block(served, ids):
    return first_stop(served, ids, CHUNKS[0]) % BLOCK == 0


@pytest.mark.parametrize("ratio", [0.001, 0.25])
def test_its_rows_are_exact_and_everybodys(served, ratio):
    """Even where the ratio is no token: a plain request has them, and answers as it does alone."""
    ids = prompt(served, CHUNKS[0], CHUNKS[1])
    (alone,) = served.run([ids], [{"enabled": False}])
    served.forget_prefixes()
    (output,) = served.run([ids], [{"recompute_ratio": ratio}])
    said, first = reuse(output), len(served.engine.library.tokens.chunk(CHUNKS[0]))
    assert (said["status"], said["remembered_tokens"]) == ("reused", 0)
    assert said["recomputed_tokens"] == first + token_budget(ratio, said["chunk_tokens"])
    (plain,) = served.run([ids], [{"enabled": False}])
    assert plain.num_cached_tokens == first_stop(served, ids, CHUNKS[0]) // BLOCK * BLOCK > 3 * BLOCK
    assert tokens(plain) == tokens(alone)


def test_at_ratio_0_nothing_is_computed_or_shared(served):
    ids = prompt(served, CHUNKS[0], CHUNKS[1])
    (output,) = served.run([ids], [{"recompute_ratio": 0.0}])
    assert reuse(output)["recomputed_tokens"] == 0
    (plain,) = served.run([ids], [{"enabled": False}])
    assert plain.num_cached_tokens == 0


def test_the_next_prompt_that_begins_so_reads_it(served):
    """The reference: the model's own rows of the beginning, and stage I and II over what stands behind."""
    texts = (text_of(count, seed=seed) for seed in range(9, 40) for count in range(8, 20))
    rules = next(one for one in texts if ends_a_block(served, prompt(served, CHUNKS[0], rules=one)))
    served.run([prompt(served, CHUNKS[0], CHUNKS[1], rules=rules)], [{"recompute_ratio": 0.25}])
    second = prompt(served, CHUNKS[0], *CHUNKS[3:], rules=rules, number=1)
    with served.selections() as selected:
        (output,) = served.run([second], [{"recompute_ratio": 0.25}])
    said, held = reuse(output), first_stop(served, second, CHUNKS[0])
    assert (said["status"], said["remembered_tokens"]) == ("reused", held)
    assert [chunk["status"] for chunk in said["chunks"]] == ["remembered", "hit", "hit"]
    text = "\n\n".join([rules, CHUNKS[0], *CHUNKS[3:], text_of(8, seed=1)])
    full = served.engine.prefill([{"role": "user", "content": text}], strategy="full_prefill")
    assert full.input_ids[0].tolist() == second
    layers = full.past_key_values.layers
    expected, rows = filled_by_the_engine(
        served, [(layer.keys[:, :, :held], layer.values[:, :, :held]) for layer in layers], second, 0.25
    )
    assert selected == [expected]
    assert said["recomputed_tokens"] == len(expected)
    assert tokens(output) == continued(served, rows, second)


def test_a_twentieth_of_a_documents_chunks_is_recomputed_behind_it(served):
    """By default; with `"opening"` it is a fifth of all."""
    first = len(served.engine.library.tokens.chunk(DOCUMENT[1]))
    for number in range(2):
        ids = prompt(served, DOCUMENT[1], DOCUMENT[3], DOCUMENT[2], number=number)
        said = reuse(served.run([ids], [{}])[0])
        assert said["recompute_ratio"] == pytest.approx(BEHIND_RATIO)
        assert [chunk["behind"] for chunk in said["chunks"]] == [1, 2, 2]  # no second cache was made
        rest = first if number == 0 else first_stop(served, ids, DOCUMENT[1]) % BLOCK
        assert said["recomputed_tokens"] == rest + token_budget(BEHIND_RATIO, said["chunk_tokens"])
        assert said["remembered_tokens"] == (0 if number == 0 else first_stop(served, ids, DOCUMENT[1]) - rest)
    ids = prompt(served, DOCUMENT[1], DOCUMENT[3], DOCUMENT[2], number=2)
    said = reuse(served.run([ids], [{"first_chunk": "opening"}])[0])
    assert said["recomputed_tokens"] == token_budget(0.2, said["chunk_tokens"])


def test_prompts_may_begin_with_words_of_an_application(served, tmp_path):
    """Then these are the opening: the identity is that of our engine with the same template."""
    template = [{"role": "user", "content": "Read this.\n\n{context}\n\n{question}"}]
    settings = ConnectorSettings(directory=str(tmp_path), prompt_template=template)
    identity = open_identity(served.llm.llm_engine.vllm_config, settings)
    ids = prompt(served, CHUNKS[0])
    start = first_stop(served, ids, CHUNKS[0]) - len(served.engine.library.tokens.chunk(CHUNKS[0]))
    assert identity.prefix_ids == tuple(ids[:start]) != served.planner._identity.prefix_ids


def test_behind_the_opening_alone_it_comes_from_its_second_cache(served):
    text = "\n\n".join([DOCUMENT[1], DOCUMENT[3], text_of(8, seed=5)])
    chat = [{"role": "user", "content": text}]
    (output,) = served.run([served.ids(chat)], [{}])
    said = reuse(output)
    assert [chunk["behind"] for chunk in said["chunks"]] == [0, 2]
    assert said["recomputed_tokens"] == token_budget(BEHIND_RATIO, said["chunk_tokens"])
    assert tokens(output) == served.engine_answer(chat)
