"""What a turn of a conversation computes: what is new, and nothing that a former turn had."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.conversations import RowState
from prophetkv_rag.model import cache_argument
from prophetkv_rag.reuse.selection.prophetkv import ProphetKV
from tests import families
from tests.conversations.chats import (
    CHUNKS,
    QUESTIONS,
    Chat,
    counted_rows,
    divergence,
    full_prefill,
    kept_rows,
    prompt_ids,
    user,
    with_context,
)
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

TOLERANCE = 1e-4
LAYERS = 3


def make_engine(**settings: Any) -> ProphetKVEngine:
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(**settings))
    engine.add_chunks(CHUNKS)
    return engine


@pytest.fixture
def engine() -> ProphetKVEngine:
    return make_engine()


def test_ten_turns_compute_what_is_new_and_are_full_prefill(engine: ProphetKVEngine) -> None:
    """No chunks: every row is exact, so each turn's rows are those of full prefill, by transformers alone."""
    chat, before = Chat(engine), 0
    for question in QUESTIONS:
        with counted_rows(engine) as rows:
            answer = chat.ask(question)
        ids = prompt_ids(engine, chat.messages[:-1])
        report = answer.report
        shared = engine.conversations.stats().tokens if before == 0 else before
        assert report.prompt_tokens == ids.shape[1] == report.remembered_tokens + report.fresh_tokens
        assert rows[0] == report.fresh_tokens == report.row_layers // LAYERS
        if before:  # the template's last line break and the text of the answer are tokenised anew: a few tokens
            assert report.remembered_tokens >= shared - 12
            assert report.fresh_tokens < 60 < report.prompt_tokens
        logits, layers = full_prefill(engine.model, ids)
        held, pairs = kept_rows(engine, ids)
        assert held.length == ids.shape[1]
        assert set(held.states.tolist()) == {int(RowState.EXACT)}
        for (keys, values), layer in zip(pairs, layers, strict=True):
            torch.testing.assert_close(keys, layer.keys[0], atol=TOLERANCE, rtol=TOLERANCE)
            torch.testing.assert_close(values, layer.values[0], atol=TOLERANCE, rtol=TOLERANCE)
        assert answer.token_ids[0] == int(logits.argmax())
        before = report.prompt_tokens + len(answer.token_ids) - 1
    assert engine.conversations.stats().tokens < 2 * before


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "smollm3", "phi", "cohere2", "glm4", "olmo3"])
def test_families_go_on_from_their_own_rows(name: str) -> None:
    """Sliding windows (16 tokens), sinks, soft-capping, partial and interleaved rotation, layers without RoPE."""
    model = families.SUPPORTED[name]()
    engine = ProphetKVEngine(model, None)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, families.VOCAB_SIZE, (1, 90), generator=generator)
    for stop in (40, 47, 90):
        result = engine.prefill(Prompt(ids[0, :stop].tolist(), [], []), remember=True)
        logits, layers = full_prefill(model, ids[:, :stop])
        torch.testing.assert_close(result.logits, logits, atol=TOLERANCE, rtol=TOLERANCE)
        for own, other in zip(result.past_key_values.layers, layers, strict=True):
            torch.testing.assert_close(own.keys, other.keys, atol=TOLERANCE, rtol=TOLERANCE)
            torch.testing.assert_close(own.values, other.values, atol=TOLERANCE, rtol=TOLERANCE)
    assert (result.report.remembered_tokens, result.report.fresh_tokens) == (47, 43)


def test_chunks_of_former_turns_are_not_loaded_again_and_new_ones_are(engine: ProphetKVEngine) -> None:
    engine.add_chunks(CORPUS[3:5])
    chat = Chat(engine)
    chat.ask(with_context(QUESTIONS[0]))
    hits = engine.store.stats().hits
    report = chat.ask(with_context(QUESTIONS[1], CORPUS[3:5])).report
    assert [chunk.status for chunk in report.chunks] == ["remembered"] * 3 + ["hit"] * 2
    assert engine.store.stats().hits == hits + 2
    assert report.chunk_tokens == report.reused_tokens + report.recomputed_tokens
    parts = (report.remembered_tokens, report.reused_tokens, report.recomputed_tokens, report.fresh_tokens)
    assert report.prompt_tokens == sum(parts)
    assert report.reused_tokens + report.fresh_tokens < report.prompt_tokens / 2
    hits = engine.store.stats().hits
    assert chat.ask(QUESTIONS[2]).report.chunk_tokens < report.chunk_tokens
    assert engine.store.stats().hits == hits


@pytest.mark.parametrize("strategy", ["prophetkv", "prophetkv_late", "epic", "random", "cacheblend", "full_reuse"])
def test_every_chunk_row_is_recomputed_at_most_once(strategy: str) -> None:
    engine = make_engine(strategy=strategy)
    chat, total = Chat(engine), 0
    for number, question in enumerate(QUESTIONS[:4]):
        with counted_rows(engine) as rows:
            report = chat.ask(question if number else with_context(question)).report
        assert rows.pop(0) >= report.recomputed_tokens
        total += report.recomputed_tokens
        held, _ = kept_rows(engine, prompt_ids(engine, chat.messages[:-1]))
        stale = int((held.states == int(RowState.STALE)).sum())
        chunk_tokens = sum(chunk.tokens for chunk in report.chunks)
        assert stale == chunk_tokens - total
    assert (total == 0) == (strategy == "full_reuse")


def test_a_question_asks_among_all_chunks_and_only_stale_rows_run(engine: ProphetKVEngine) -> None:
    """What the strategy picks of all chunk tokens is computed afterwards: now, or in a former turn."""
    chat = Chat(engine)
    first = chat.ask(with_context(QUESTIONS[0])).report
    held, _ = kept_rows(engine, prompt_ids(engine, chat.messages[:-1]))
    messages = [*chat.messages, user(QUESTIONS[1])]
    result = engine.prefill(messages, remember=True)
    scores = torch.from_numpy(result.view().scores)
    budget = int(0.2 * sum(chunk.tokens for chunk in first.chunks))
    layout = engine.read(messages)
    wanted = torch.topk(torch.where(layout.is_chunk, scores, -1), budget).indices.sort().values
    fresh_before = wanted[held.states[wanted] != int(RowState.STALE)]
    assert len(fresh_before) > 0
    assert result.recomputed.tolist() == [row for row in wanted.tolist() if row not in fresh_before.tolist()]
    assert result.report.recomputed_tokens == len(wanted) - len(fresh_before)
    rows = result.report.fresh_tokens + result.report.recomputed_tokens
    assert result.report.row_layers == LAYERS * (result.report.fresh_tokens + rows)  # stage I, and stage II


class Watching(ProphetKV):
    """ProphetKV that keeps what stage I saw."""

    name = "watching"

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", {})

    __slots__ = ("seen",)

    def scores(self, context: Any) -> torch.Tensor:
        held = context.held_rows
        self.seen["held"] = held
        self.seen["layers"] = [
            (layer.keys[:, :, :held].clone(), layer.values[:, :, :held].clone()) for layer in context.layers
        ]
        self.seen["scores"] = super().scores(context)
        return self.seen["scores"]


def test_the_new_question_sees_all_that_was_taken_over() -> None:
    """Stage I's scores, against the weights of transformers' own eager attention over the same rows."""
    model = tiny_llama(attn_implementation="eager")
    engine = ProphetKVEngine(model, tiny_tokenizer(), config=ProphetKVConfig(score_softmax="full_row"))
    engine.add_chunks(CHUNKS)
    chat, strategy = Chat(engine), Watching()
    chat.ask(with_context(QUESTIONS[0]))
    result = engine.prefill([*chat.messages, user(QUESTIONS[1])], strategy=strategy, remember=True)
    held = strategy.seen["held"]
    assert held == result.report.remembered_tokens + result.report.recomputed_tokens
    cache = DynamicCache()
    for index, (keys, values) in enumerate(strategy.seen["layers"]):
        cache.update(keys, values, index)
    ids = result.input_ids[:, held:]
    with torch.no_grad():
        found = model(ids, **cache_argument(model, cache), use_cache=True, output_attentions=True)
    expected = sum(weights[0].mean(dim=(0, 1)) for weights in found.attentions)
    is_chunk = engine.read([*chat.messages, user(QUESTIONS[1])]).is_chunk
    torch.testing.assert_close(strategy.seen["scores"][is_chunk], expected[is_chunk], atol=1e-5, rtol=1e-4)


def test_a_chunk_that_a_former_prompt_held_in_part_is_loaded_whole(engine: ProphetKVEngine) -> None:
    """A text cut off in the middle of a chunk: its rows there are of the very tokens, and still not the chunk's."""
    whole = engine.read([user(with_context(QUESTIONS[0]))])
    chunk = whole.chunks[1]
    engine.prefill(Prompt(whole.input_ids[: chunk.start + 5].tolist(), [], []), remember=True)
    report = engine.prefill([user(with_context(QUESTIONS[0]))], remember=True).report
    assert report.remembered_tokens <= chunk.start
    assert report.chunks[1].status == "hit"
    parts = (report.remembered_tokens, report.reused_tokens, report.recomputed_tokens, report.fresh_tokens)
    assert report.prompt_tokens == sum(parts)


def test_rows_that_are_taken_over_are_left_as_they_are(engine: ProphetKVEngine) -> None:
    chat = Chat(engine)
    chat.ask(with_context(QUESTIONS[0]))
    _, pairs = kept_rows(engine, prompt_ids(engine, chat.messages))
    pairs = [(keys.clone(), values.clone()) for keys, values in pairs]
    result = engine.prefill([*chat.messages, user(QUESTIONS[1])], remember=True)
    length = result.report.remembered_tokens + result.report.recomputed_tokens
    kept = torch.ones(length, dtype=torch.bool)
    kept[result.recomputed] = False
    assert 0 < int((~kept).sum()) < length / 4
    for (keys, values), layer in zip(pairs, result.past_key_values.layers, strict=True):
        assert torch.equal(layer.keys[0, :, :length][:, kept], keys[:, :length][:, kept])
        assert torch.equal(layer.values[0, :, :length][:, kept], values[:, :length][:, kept])


def test_only_rows_over_exact_rows_are_exact(engine: ProphetKVEngine) -> None:
    """What is called exact is full prefill's, row by row; nothing behind a stale row is called so."""
    chat = Chat(engine)
    chat.ask(with_context(QUESTIONS[0]))
    ids = prompt_ids(engine, chat.messages[:-1])
    held, pairs = kept_rows(engine, ids)
    _, layers = full_prefill(engine.model, ids)
    start = engine.read(chat.messages[:-1]).context_start
    is_exact = held.states == int(RowState.EXACT)
    assert int(is_exact.sum()) >= start > 0
    first = int((held.states == int(RowState.STALE)).nonzero()[0])
    assert not is_exact[first:].any()
    for (keys, values), layer in zip(pairs, layers, strict=True):
        torch.testing.assert_close(keys[:, is_exact], layer.keys[0][:, is_exact], atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(values[:, is_exact], layer.values[0][:, is_exact], atol=TOLERANCE, rtol=TOLERANCE)


def test_going_on_is_no_farther_from_full_prefill_than_beginning_anew() -> None:
    """Ten turns on three models: the history is the same for both, and so is the truth."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(3):
        engine = ProphetKVEngine(tiny_llama(seed=seed, initializer_range=0.2), tiny_tokenizer())
        engine.add_chunks(CHUNKS)
        chat = Chat(engine)
        for number, question in enumerate(QUESTIONS):
            chat.ask(question if number else with_context(question))
            truth, _ = full_prefill(engine.model, prompt_ids(engine, chat.messages[:-1]))
            for remembers in (True, False):
                result = engine.prefill(chat.messages[:-1], remember=remembers, tenant="measured")
                if number:
                    found[remembers].append(divergence(result.logits, truth))
    assert len(found[True]) == 27
    assert 0 < sum(found[True]) < sum(found[False])


def test_the_first_turn_is_as_without() -> None:
    answers = [make_engine(remember=on).generate([user(with_context(QUESTIONS[0]))]) for on in (True, False)]
    assert answers[0].token_ids == answers[1].token_ids
    numbers = [{**answer.report.to_dict(), "timings_s": None} for answer in answers]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("settings", [{"recompute_ratio": 1.0}, {"strategy": "full_prefill"}])
def test_full_prefill_takes_over_nothing(engine: ProphetKVEngine, settings: dict[str, Any]) -> None:
    chat = Chat(engine)
    chat.ask(with_context(QUESTIONS[0]))
    chat.messages.append(user(QUESTIONS[1]))
    before = engine.prefill(chat.messages, **settings)
    after = engine.prefill(chat.messages, remember=True, **settings)
    assert after.report.remembered_tokens == 0
    assert torch.equal(before.logits, after.logits)
    for one, other in zip(before.past_key_values.layers, after.past_key_values.layers, strict=True):
        assert torch.equal(one.keys, other.keys)


def test_full_prefills_rows_take_the_place_of_stale_ones(engine: ProphetKVEngine) -> None:
    chat = Chat(engine)
    chat.ask(with_context(QUESTIONS[0]))
    chat.ask(QUESTIONS[1], strategy="full_prefill")
    ids = prompt_ids(engine, chat.messages[:-1])
    held, pairs = kept_rows(engine, ids)
    assert set(held.states.tolist()) == {int(RowState.EXACT)}
    for (keys, _), layer in zip(pairs, full_prefill(engine.model, ids)[1], strict=True):
        torch.testing.assert_close(keys, layer.keys[0], atol=TOLERANCE, rtol=TOLERANCE)


def test_a_repeated_prompt_computes_one_token_and_answers_alike(engine: ProphetKVEngine) -> None:
    messages = [user(with_context(QUESTIONS[0]))]
    first, second = (engine.generate(messages) for _ in range(2))
    assert first.token_ids == second.token_ids
    report = second.report
    assert (report.fresh_tokens, report.recomputed_tokens) == (1, 0)
    assert report.remembered_tokens == report.prompt_tokens - 1


def test_a_repeated_prompt_with_other_settings_asks_again(engine: ProphetKVEngine) -> None:
    messages = [user(with_context(QUESTIONS[0]))]
    engine.generate(messages, recompute_ratio=0.0)
    report = engine.generate(messages, recompute_ratio=0.5).report
    assert report.recomputed_tokens == int(0.5 * sum(chunk.tokens for chunk in report.chunks))
    question = report.prompt_tokens - engine.read(messages).question_rows[0]
    assert report.fresh_tokens == question > 1  # all of it asks, as it did at first


def test_another_question_on_the_same_context_asks_whole(engine: ProphetKVEngine) -> None:
    engine.generate([user(with_context("How many planes are there?"))])
    messages = [user(with_context("How many tanks are there?"))]
    report = engine.generate(messages).report
    assert report.fresh_tokens == report.prompt_tokens - engine.read(messages).question_rows[0]
    assert [chunk.status for chunk in report.chunks] == ["remembered"] * 3


def test_a_context_that_differs_costs_what_differs(engine: ProphetKVEngine) -> None:
    engine.generate([user(with_context(QUESTIONS[0]))])
    report = engine.generate([user(with_context(QUESTIONS[0], [CHUNKS[0], CHUNKS[2], CHUNKS[1]]))]).report
    assert [chunk.status for chunk in report.chunks] == ["remembered", "hit", "hit"]


def test_an_answer_that_is_sent_back_altered_costs_its_rest(engine: ProphetKVEngine) -> None:
    chat = Chat(engine)
    answer = chat.ask(QUESTIONS[0])
    chat.messages[-1]["content"] = chat.messages[-1]["content"].strip()[: len(answer.text) // 2] + " -- cut"
    ids = prompt_ids(engine, [*chat.messages, user(QUESTIONS[1])])
    report = chat.ask(QUESTIONS[1]).report
    logits, _ = full_prefill(engine.model, ids)
    assert answer.report.prompt_tokens <= report.remembered_tokens < answer.report.prompt_tokens + 8
    assert divergence(engine.prefill(chat.messages[:-1], remember=True).logits, logits) < 1e-6


def test_answers_that_come_back_altered_from_their_first_token_cost_themselves(engine: ProphetKVEngine) -> None:
    """A client that strips them, say: the questions before are not computed again for it."""
    chat = Chat(engine)
    for number, question in enumerate(QUESTIONS[:5]):
        report = chat.ask(question if number else with_context(question)).report
        chat.messages[-1]["content"] = "Well, " + chat.messages[-1]["content"]
        if number:
            new = sum(len(engine.tokenizer(said["content"])["input_ids"]) for said in chat.messages[-3:-1])
            assert report.fresh_tokens < new + 16


def test_a_raw_prompt_that_goes_on_computes_what_is_new(engine: ProphetKVEngine) -> None:
    """Nobody says what its question is: it is what stands behind the former prompt."""
    text = with_context(QUESTIONS[0]) + "\nAnswer:"
    for question in QUESTIONS[1:4]:
        answer = engine.generate(text, max_new_tokens=4)
        added = f" {answer.text}\n\nQuestion: {question}\nAnswer:"
        text += added
    report = engine.generate(text, max_new_tokens=4).report
    assert report.fresh_tokens < len(engine.tokenizer(added)["input_ids"]) + 8


@pytest.mark.parametrize("way", ["stop", "closed", "cancelled", "length", "failed"])
def test_only_rows_that_are_in_the_cache_are_kept(engine: ProphetKVEngine, way: str) -> None:
    """Whatever ends an answer, what is kept of it is what full prefill has for those tokens."""
    messages = [user(QUESTIONS[0])]
    whole = engine.generate(messages, max_new_tokens=12, remember=False)
    cancel, settings = threading.Event(), {"max_new_tokens": 12}
    if way == "stop":
        settings["stop"] = [whole.text[len(whole.text) // 2 :]]
    pieces = engine.stream(messages, cancel=cancel, **settings)
    handle = None
    if way == "failed":
        calls: list[int] = []

        def fail(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 5:  # one layer has the row by then, the other two have not
                msg = "the device fell off"
                raise RuntimeError(msg)

        handle = engine.model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="fell off"):
            list(pieces)
        handle.remove()
    elif way in ("closed", "cancelled"):
        next(pieces)
        cancel.set() if way == "cancelled" else pieces.close()
        list(pieces)
    else:
        list(pieces)
    ids = prompt_ids(engine, messages)
    ids = torch.cat([ids, torch.tensor([whole.token_ids])], dim=1)
    held, pairs = kept_rows(engine, ids)
    least = ids.shape[1] - len(whole.token_ids)
    assert least <= held.length < ids.shape[1]
    assert (way in ("closed", "cancelled")) or held.length > least
    _, layers = full_prefill(engine.model, ids)
    for (keys, values), layer in zip(pairs, layers, strict=True):
        torch.testing.assert_close(keys, layer.keys[0][:, : held.length], atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(values, layer.values[0][:, : held.length], atol=TOLERANCE, rtol=TOLERANCE)


def test_it_is_switched_off_for_an_engine_and_for_a_call(engine: ProphetKVEngine) -> None:
    chat = Chat(make_engine(remember=False))
    assert [chat.ask(question).report.remembered_tokens for question in QUESTIONS[:2]] == [0, 0]
    assert chat.engine.conversations.stats().tokens == 0
    chat = Chat(engine, remember=False)
    assert [chat.ask(question).report.remembered_tokens for question in QUESTIONS[:2]] == [0, 0]
    assert engine.conversations.stats().tokens == 0
    engine.prefill([user(QUESTIONS[0])])
    assert engine.conversations.stats().tokens == 0


def test_what_a_caller_does_to_his_cache_is_his_own(engine: ProphetKVEngine) -> None:
    messages = [user(QUESTIONS[0])]
    result = engine.prefill(messages, remember=True)
    for layer in result.past_key_values.layers:
        layer.keys.zero_()
    _, pairs = kept_rows(engine, result.input_ids)
    assert all(keys.abs().sum() > 0 for keys, _ in pairs)
    again = engine.prefill(messages, remember=True)
    torch.testing.assert_close(again.logits, result.logits)


def test_sampling_and_its_answers_are_remembered(engine: ProphetKVEngine) -> None:
    chat = Chat(engine, temperature=1.0, seed=3)
    first = chat.ask(QUESTIONS[0])
    ids = torch.cat([prompt_ids(engine, chat.messages[:1]), torch.tensor([first.token_ids])], dim=1)
    held = engine.conversations.match(ids[0], "")
    assert held.length == ids.shape[1] - int(first.finish_reason == "length")


def test_threads_share_one_engine(engine: ProphetKVEngine) -> None:
    """Ten conversations at once: each ends as it does alone."""
    expected = []
    for number in range(5):
        chat = Chat(make_engine(remember=False), max_new_tokens=4)
        expected.append([chat.ask(f"{number}: {question}").token_ids for question in QUESTIONS[:3]])
    found: dict[int, list[Any]] = {}

    def talk(number: int) -> None:
        chat = Chat(engine, max_new_tokens=4)
        found[number] = [chat.ask(f"{number}: {question}").token_ids for question in QUESTIONS[:3]]

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(5)] == expected
