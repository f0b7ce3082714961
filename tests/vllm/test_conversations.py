"""The next turn of a conversation has the blocks of the one before: what it computes, what it answers, who gets them.

The reference is our engine on the same weights: its rows of the first turn, its answer behind them, and then either a
plain forward over what is new, or stage I and II over the chunks that are.
"""

from __future__ import annotations

import copy

import pytest
import torch

from prophetkv_rag.model import CACHE_NAME, TransformersRunner
from prophetkv_rag.prompt import ChunkSpan, PromptLayout
from prophetkv_rag.reuse import QueryContext, assemble_caches, make_strategy, rows_job, token_budget
from tests.tiny import save_tiny, text_of
from tests.vllm.serving import ANSWER, Served, reuse, tokens
from tests.vllm.test_models import SHAPE

BLOCK = 32
CHUNKS = [text_of(70, seed=seed) for seed in range(5)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    served = Served(save_tiny(directory / "model", **SHAPE), directory / "caches", block_size=BLOCK)
    served.register(CHUNKS)
    yield served
    served.close()


@pytest.fixture(autouse=True)
def _without_former_prompts(served):
    served.forget_prompts()


def first_turn(served, number=0):
    text = "\n\n".join(CHUNKS[:3]) + f"\n\n{text_of(8, seed=50 + number)}"
    return served.ids([{"role": "user", "content": text}])


def next_turn(served, ids, answer, *texts):
    """The prompt and its answer, and what the user says then."""
    tokenizer = served.engine.library.tokens.tokenizer
    said = "\n\n".join(texts)
    rest = f"<|im_end|>\n<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    return [*ids, *answer, *tokenizer.encode(rest, add_special_tokens=False)]


QUESTION = text_of(8, seed=70)


def two_turns(served, *texts, options=None, later=None, tenant=None, new_tenant=None):
    """Both turns; returns the first one's answer, the second prompt, and its output."""
    options = options or {}
    first = first_turn(served)
    answer = tokens(served.run([first], [options], tenant=tenant)[0])
    second = next_turn(served, first, answer, *texts, QUESTION)
    (output,) = served.run([second], [options if later is None else later], tenant=new_tenant or tenant)
    return answer, second, output


def remembered(output):
    """Tokens that came from somewhere else than this very request."""
    said = reuse(output)
    return said["remembered_tokens"] if said else output.num_cached_tokens


def held_blocks(first, answer):
    return (len(first) + len(answer) - 1) // BLOCK * BLOCK


def rows_of_the_first_turn(served, answer, num_held, **settings):
    """Our engine's rows of the first prompt and its answer: `num_held` of them."""
    prompt = [{"role": "user", "content": "\n\n".join(CHUNKS[:3]) + f"\n\n{text_of(8, seed=50)}"}]
    result = served.engine.prefill(prompt, **settings)
    cache = copy.deepcopy(result.inputs[CACHE_NAME])
    last = torch.tensor([[*first_turn(served)[-1:], *answer]])
    positions = torch.arange(last.shape[1])[None] + len(first_turn(served)) - 1
    with torch.inference_mode():
        served.engine.model(last, position_ids=positions, **{CACHE_NAME: cache})
    return [(layer.keys[:, :, :num_held].clone(), layer.values[:, :, :num_held].clone()) for layer in cache.layers]


def continued(served, rows, ids):
    """Greedy tokens of the engine's model over rows of its first tokens."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(rows):
        cache.update(keys.clone(), values.clone(), number)
    found, new = [], torch.tensor([ids[rows[0][0].shape[2] :]])
    with torch.inference_mode():
        for _ in range(ANSWER):
            at = cache.get_seq_length()
            positions = torch.arange(at, at + new.shape[1])[None]
            logits = served.engine.model(new, position_ids=positions, **{CACHE_NAME: cache}).logits
            new = logits[:, -1:].argmax(-1)
            found.append(int(new))
    return found


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_a_turn_without_new_chunks_computes_what_is_new(served, ratio):
    answer, second, output = two_turns(served, options={"recompute_ratio": ratio})
    held = held_blocks(first_turn(served), answer)
    assert output.num_cached_tokens == held > 250
    said = reuse(output)
    assert (said["status"], said["remembered_tokens"], said["chunk_tokens"]) == ("prefix_cache", held, 0)
    assert [chunk["status"] for chunk in said["chunks"]] == ["remembered"] * 3
    assert said["row_layers"] == (len(second) - held) * SHAPE["num_hidden_layers"]
    rows = rows_of_the_first_turn(served, answer, held, recompute_ratio=ratio)
    assert tokens(output) == continued(served, rows, second)


def filled_by_the_engine(served, rows, ids, ratio):
    """Rows of a prompt whose first ones are given and whose chunks behind them are reused, by stage I and II."""
    engine, held = served.engine, rows[0][0].shape[2]
    spans = []
    for text in CHUNKS[3:]:
        chunk = engine.library.tokens.chunk(text)
        start = next((at for at in range(held, len(ids)) if ids[at : at + len(chunk)] == chunk), None)
        if start is not None:
            spans.append(ChunkSpan(engine.key_of(text), start, tuple(chunk)))
    layout = PromptLayout(torch.tensor(ids), tuple(spans), known_prefix=held)
    found = [
        engine.store.find(span.key, fingerprint=engine.identity.fingerprint, input_ids=None).cache for span in spans
    ]
    support, runner = engine.support, TransformersRunner(engine.model)
    starts = [span.start for span in spans]
    layers = assemble_caches(support, found, starts, len(ids), dtype=torch.float32, device=torch.device("cpu"))
    for layer, (keys, values) in zip(layers, rows, strict=True):
        layer.keys[:, :, :held], layer.values[:, :, :held] = keys, values
    context = QueryContext(
        runner=runner,
        support=support,
        layers=layers,
        layout=layout,
        input_ids=layout.input_ids,
        is_chunk=layout.is_chunk,
        eligible=layout.is_chunk,
        budget=token_budget(ratio, layout.num_chunk_tokens),
        recompute_ratio=ratio,
        config=engine.config,
        exact_rows=held,
        held_rows=held,
    )
    with torch.inference_mode():
        selected = make_strategy("prophetkv").select(context).positions
        wanted = ~layout.is_chunk
        wanted[:held] = False
        wanted[-1] = False
        always = wanted.nonzero()[:, 0]
        wanted[selected] = True
        job = rows_job(support, layers, layout.input_ids, wanted.nonzero()[:, 0], always=always, visible=None)
        runner.run([job])
    last = len(ids) - 1
    return set(selected.tolist()), [(layer.keys[:, :, :last], layer.values[:, :, :last]) for layer in layers]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("count", [1, 2])
def test_new_chunks_are_reused_behind_the_turn_before(served, ratio, count):
    with served.selections() as selected:
        answer, second, output = two_turns(served, *CHUNKS[3 : 3 + count], options={"recompute_ratio": ratio})
    held = held_blocks(first_turn(served), answer)
    said = reuse(output)
    assert (said["status"], said["remembered_tokens"]) == ("reused", held)
    assert [chunk["status"] for chunk in said["chunks"]] == ["remembered"] * 3 + ["hit"] * count
    assert said["chunk_tokens"] == sum(len(served.engine.library.tokens.chunk(one)) for one in CHUNKS[3 : 3 + count])
    rows = rows_of_the_first_turn(served, answer, held, recompute_ratio=ratio)
    expected, rows = filled_by_the_engine(served, rows, second, ratio)
    assert selected[-1] == expected
    assert len(expected) == said["recomputed_tokens"] == token_budget(ratio, said["chunk_tokens"])
    assert tokens(output) == continued(served, rows, second)
    # A third turn has what the second had.
    third = next_turn(served, second, tokens(output), QUESTION)
    held = held_blocks(second, tokens(output))
    (output,) = served.run([third], [{"recompute_ratio": ratio}])
    assert output.num_cached_tokens == reuse(output)["remembered_tokens"] == held


def test_ratio_one_is_full_prefill_in_every_turn(served):
    _, second, output = two_turns(served, CHUNKS[3], options={"recompute_ratio": 1.0})
    (plain,) = served.run([second], [{"enabled": False}])
    assert tokens(output) == tokens(plain)
    assert output.num_cached_tokens > plain.num_cached_tokens == 0


def test_rows_of_a_conversation_reach_nobody_else(served):
    """Not a plain request of the same text, another tenant, other settings, or a prompt that only begins alike."""
    two_turns(served, CHUNKS[3], tenant="alice")
    first = first_turn(served)
    answer = tokens(served.run([first], [{}], tenant="alice")[0])
    second = next_turn(served, first, answer, QUESTION)
    for options, tenant in (
        ({"enabled": False}, "alice"),
        ({}, "bob"),
        ({}, None),
        ({"recompute_ratio": 0.5}, "alice"),
    ):
        (output,) = served.run([second], [options], tenant=tenant)
        assert remembered(output) == 0, (options, tenant)
    (output,) = served.run([second], [{}], tenant="alice")
    assert remembered(output) >= len(first) // BLOCK * BLOCK
    (output,) = served.run([first_turn(served, 1)], [{}], tenant="alice")  # another question about the same chunks
    assert remembered(output) == 0


def test_a_deleted_chunk_ends_a_conversation(served):
    extra = text_of(70, seed=40)
    (key,) = served.register([extra])
    first = served.ids([{"role": "user", "content": f"{extra}\n\n{CHUNKS[0]}\n\n{QUESTION}"}])
    answer = tokens(served.run([first], [{}])[0])
    second = next_turn(served, first, answer, QUESTION)
    assert remembered(served.run([second], [{}])[0]) > 0
    served.planner._store.delete([key])
    (output,) = served.run([second], [{}])
    assert remembered(output) == 0
    assert [chunk["status"] for chunk in reuse(output)["chunks"]] == ["hit"]
    served.register([extra])  # the same text again: the rows of before stay where they are
    (output,) = served.run([second], [{}])
    assert (remembered(output), len(reuse(output)["chunks"])) == (0, 2)


def test_blocks_that_vllm_dropped_meanwhile_are_filled_anew(served):
    first = first_turn(served)
    answer = tokens(served.run([first], [{"recompute_ratio": 0.25}])[0])
    second = next_turn(served, first, answer, CHUNKS[3], QUESTION)
    served.forget_prefixes()
    (output,) = served.run([second], [{"recompute_ratio": 0.25}])
    assert remembered(output) == 0
    assert [chunk["status"] for chunk in reuse(output)["chunks"]] == ["hit"] * 4
    served.forget_prompts()
    assert tokens(output) == tokens(served.run([second], [{"recompute_ratio": 0.25}])[0])


def test_turns_at_once_answer_as_one_by_one(served):
    """Four go on from one turn, two of them alike: none reads rows that are not written yet."""
    first = first_turn(served)
    answer = tokens(served.run([first], [{}])[0])
    turns = [next_turn(served, first, answer, CHUNKS[3 + n % 2], text_of(8, seed=80 + n)) for n in (0, 1, 2, 2)]
    together = [tokens(one) for one in served.run(turns, [{}] * 4)]
    alone = []
    for turn in turns:
        served.forget_prompts()
        served.run([first], [{}])
        alone.append(tokens(served.run([turn], [{}])[0]))
    assert together == alone


def test_a_turn_waits_for_rows_that_another_one_writes(served):
    """vLLM has dropped the end of the former answer, one request computes it again, and another reads it."""
    pool = served.scheduler.kv_cache_manager
    first = first_turn(served)
    answer = tokens(served.run([first], [{}], max_tokens=80)[0])
    turns = [next_turn(served, first, answer, text_of(40, seed=81)), next_turn(served, first, answer, CHUNKS[3])]
    expected = [tokens(served.run([turn], [{}])[0]) for turn in turns]
    served.forget_prompts()
    served.run([first], [{}], max_tokens=80)
    ((turn,),) = (served.planner._turns._turns.values(),)
    dropped = [pool.block_pool.get_cached_block(one, [0])[0].block_id for one in turn.hashes[-2:]]
    pool.evict_blocks(set(dropped))
    outputs = served.run(turns, [{}] * 2)
    assert [tokens(output) for output in outputs] == expected
    held = held_blocks(first, answer)
    assert [reuse(output)["remembered_tokens"] for output in outputs] == [held - 2 * BLOCK, held]


def test_what_cannot_be_read_is_computed(served, monkeypatch):
    monkeypatch.setattr(served.planner, "_can_read", True)
    monkeypatch.setattr(served.stages, "_readers", None)
    answer, second, output = two_turns(served, CHUNKS[3], options={"recompute_ratio": 0.0})
    held = held_blocks(first_turn(served), answer)
    rows = rows_of_the_first_turn(served, answer, held, recompute_ratio=0.0)
    assert tokens(output) == continued(served, rows, second)  # the new chunk is computed whole
    assert not served.planner._can_read
