"""What stands before a prompt's first chunk is shared with whoever begins alike: its rows are exact.

The reference is our engine's answer to the same prompt, which computes all of it.
"""

from __future__ import annotations

import pytest

from prophetkv_rag.integrations.vllm.written import WrittenRows
from tests.tiny import save_tiny, text_of
from tests.vllm.serving import Served, reuse, tokens
from tests.vllm.test_conversations import BLOCK, CHUNKS, next_turn
from tests.vllm.test_models import SHAPE

STEP = 512
RULES = text_of(50, seed=61)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    model = save_tiny(directory / "model", **SHAPE)
    # Steps are short: a long beginning takes several.
    served = Served(model, directory / "caches", block_size=BLOCK, max_num_batched_tokens=STEP)
    served.register(CHUNKS)
    yield served
    served.close()


@pytest.fixture(autouse=True)
def _without_former_prompts(served):
    served.forget_prompts()


def prompt(*chunks, rules=RULES, number=0):
    text = "\n\n".join(CHUNKS[one] for one in chunks)
    return [{"role": "system", "content": rules}, {"role": "user", "content": f"{text}\n\n{text_of(8, seed=number)}"}]


def beginning(served, one):
    """Whole blocks before the first chunk."""
    return served.engine.read(one).chunks[0].start // BLOCK * BLOCK


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_other_chunks_behind_the_same_beginning(served, ratio):
    first, second = prompt(0, 1), prompt(2, 3, number=1)
    held = beginning(served, first)
    assert held >= 3 * BLOCK
    served.answers([first], ratio)
    with served.selections() as selected:
        (output,) = served.run([served.ids(second)], [{"recompute_ratio": ratio}])
    said, ours = reuse(output), served.engine.prefill(second, recompute_ratio=ratio)
    assert (said["status"], said["remembered_tokens"], output.num_cached_tokens >= held) == ("reused", held, True)
    assert [chunk["status"] for chunk in said["chunks"]] == ["hit", "hit"]
    layout = served.engine.read(second)
    stage_two = layout.num_tokens - held - said["reused_tokens"]
    stage_one = layout.context_start - held + layout.num_tokens - layout.suffix_start if ratio == 0.25 else 0
    assert said["row_layers"] == (stage_one + stage_two) * SHAPE["num_hidden_layers"]
    assert selected == [set(ours.recomputed.tolist())]
    assert tokens(output) == served.engine_answer(second, recompute_ratio=ratio)


def test_plain_requests_share_it_both_ways_and_nothing_more(served):
    ours, ids = prompt(0, 1), served.ids(prompt(0, 1))
    held = beginning(served, ours)
    (exact,) = served.full([ours])
    (output,) = served.run([ids], [{"recompute_ratio": 0.0}])  # the plain request's blocks
    assert (reuse(output)["status"], reuse(output)["remembered_tokens"]) == ("reused", held)
    stale = tokens(output)
    assert stale == served.engine_answer(ours, recompute_ratio=0.0) != exact
    served.forget_prompts()
    assert served.answers([ours], 0.0) == [stale]
    (plain,) = served.run([ids], [{"enabled": False}])  # ours, up to the first chunk
    assert (tokens(plain), plain.num_cached_tokens) == (exact, held)


def test_another_tenant_begins_anew(served):
    served.run([served.ids(prompt(0, 1))], [{}], tenant="alice")
    for tenant, count in (("bob", 0), (None, 0), ("alice", beginning(served, prompt(2)))):
        (output,) = served.run([served.ids(prompt(2, number=len(str(tenant))))], [{}], tenant=tenant)
        assert (reuse(output)["status"], reuse(output)["remembered_tokens"]) == ("reused", count), tenant


def test_a_turn_with_chunks_goes_on_from_one_without(served):
    """As an application that retrieves for some questions only."""
    chat = [{"role": "user", "content": text_of(60, seed=62)}]
    (first,) = served.run([served.ids(chat)], max_tokens=40)
    ids = next_turn(served, served.ids(chat), tokens(first), CHUNKS[0], CHUNKS[1], text_of(8, seed=63))
    (output,) = served.run([ids], [{"recompute_ratio": 0.25}])
    whole = (len(served.ids(chat)) + len(tokens(first)) - 1) // BLOCK * BLOCK
    assert (reuse(output)["status"], reuse(output)["remembered_tokens"]) == ("reused", whole)
    again = tokens(output)
    served.forget_prompts()
    assert [again] == [tokens(one) for one in served.run([ids], [{"recompute_ratio": 0.25}])]


def at_once_and_one_by_one(served, seed):
    """One plain request and three of ours, all behind a beginning that takes several steps; both ways' answers."""
    rules = text_of(400, seed=seed)
    asked = ((4,), (0, 1), (2, 3), (1, 2))
    ids = [served.ids(prompt(*chunks, rules=rules, number=number)) for number, chunks in enumerate(asked)]
    options = [{"enabled": False}, *[{"recompute_ratio": 0.25}] * 3]
    outputs = served.run(ids, options)
    served.forget_prompts()
    return outputs, [tokens(served.run([one], [said])[0]) for one, said in zip(ids, options, strict=True)]


def test_nobody_reads_what_is_not_written_yet(served, monkeypatch):
    outputs, one_by_one = at_once_and_one_by_one(served, 64)
    assert [tokens(output) for output in outputs] == one_by_one
    # None of ours computed it: that would be too long for a step of this server.
    assert [reuse(output)["status"] for output in outputs[1:]] == ["reused"] * 3
    assert min(reuse(output)["remembered_tokens"] for output in outputs[1:]) > STEP

    served.forget_prompts()
    monkeypatch.setattr(WrittenRows, "are_there", lambda *args: True)  # else this proves nothing
    outputs, one_by_one = at_once_and_one_by_one(served, 65)
    assert [tokens(output) for output in outputs] != one_by_one


def test_a_beginning_that_cannot_be_read_is_computed(served, monkeypatch):
    monkeypatch.setattr(served.planner, "_can_read", False)
    served.answers([prompt(0, 1)], 0.25)
    (output,) = served.run([served.ids(prompt(2, 3))], [{"recompute_ratio": 0.25}])
    assert (reuse(output)["status"], reuse(output)["remembered_tokens"]) == ("reused", 0)
    assert output.num_cached_tokens >= beginning(served, prompt(2, 3))  # those blocks are shared, not written again
    assert tokens(output) == served.engine_answer(prompt(2, 3), recompute_ratio=0.25)
