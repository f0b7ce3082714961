"""Messages behind retrieved context that changed: found where they stand now, as stale as a chunk, and not shared."""

from __future__ import annotations

import random
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.conversations import SHORTEST, RowState
from prophetkv_rag.conversations.insertion import NewRows, insert
from prophetkv_rag.conversations.moving import MovedRows, find_moved
from prophetkv_rag.conversations.rows import Trace
from prophetkv_rag.conversations.tree import Node, Part
from prophetkv_rag.model import RopeTables, RowsLayer, cache_argument
from prophetkv_rag.reuse import continuing
from tests import families
from tests.conversations.chats import Chat, counted_rows, divergence, full_prefill, kept_rows, prompt_ids, user
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

CONTEXTS = [CORPUS[:2], CORPUS[2:4], CORPUS[3:6]]
SAID = [
    ("How many planes shall be produced, and how many tanks?", "It shall be 60,000 planes, as the passage says."),
    ("And who watches the quick brown fox jump?", "There are 1234567890 people on the bank of the river."),
    ("Does the harbour ever close at night?", "No, it never does; the library and the museum do."),
]
QUESTION = "What was learned on Monday?"
LAYERS = 3


def make_engine(seed: int = 0, **settings: Any) -> ProphetKVEngine:
    model = tiny_llama(seed=seed, initializer_range=0.2)
    engine = ProphetKVEngine(model, tiny_tokenizer(), config=ProphetKVConfig(encoding="plain", **settings))
    engine.add_chunks(CORPUS[:6])
    return engine


@pytest.fixture(autouse=True)
def all_moves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Histories here are short; that their latest tokens are computed has tests of its own."""
    if "latest" not in request.node.name:
        monkeypatch.setattr(continuing, "RECENT", 0)


@pytest.fixture
def engine() -> ProphetKVEngine:
    return make_engine()


def messages(chunks: Any, said: Any = SAID, question: str = QUESTION) -> list[dict[str, str]]:
    """What chat engines send that retrieve for every question: context in the system message, history, question."""
    context = "Answer from this context:\n\n" + "\n\n".join(chunks)
    history = [one for asked, told in said for one in (user(asked), {"role": "assistant", "content": told})]
    return [{"role": "system", "content": context}, *history, user(question)]


def history_of(engine: ProphetKVEngine, sent: list[dict[str, str]]) -> tuple[int, int]:
    """Where the messages stand between the one that holds the chunks and the one that asks."""
    layout = engine.read(sent)
    start = next(mark for mark in layout.marks if mark >= layout.chunks[-1].stop)
    return start, max(mark for mark in layout.marks if mark < layout.question_rows[0])


def sum_of(report: Any) -> int:
    return report.remembered_tokens + report.reused_tokens + report.recomputed_tokens + report.fresh_tokens


def test_the_history_behind_changed_context_is_found_and_not_computed_again(engine: ProphetKVEngine) -> None:
    first = engine.generate(messages(CONTEXTS[0]), max_new_tokens=4).report
    assert first.moved_tokens == 0
    sent = messages(CONTEXTS[1])
    start, stop = history_of(engine, sent)
    with counted_rows(engine) as rows:
        report = engine.generate(sent, max_new_tokens=4).report
    assert report.moved_tokens == stop - start > 100  # all of it
    assert sum_of(report) == report.prompt_tokens
    assert report.chunk_tokens == report.reused_tokens + report.recomputed_tokens
    assert report.chunk_tokens == report.moved_tokens + sum(chunk.tokens for chunk in report.chunks)
    assert report.fresh_tokens < 60
    assert rows[1] == report.fresh_tokens + report.recomputed_tokens  # stage II
    unavoidable = report.prompt_tokens - report.remembered_tokens - report.chunk_tokens
    ran = report.row_layers - unavoidable * LAYERS
    assert report.charged_ratio == pytest.approx(ran / (report.chunk_tokens * LAYERS), abs=0.1)


INSTRUCTIONS = (
    "\nGiven the context information above and not prior knowledge, answer the query in one sentence.\nQuery: "
)


@pytest.mark.parametrize("role", ["system", "user", None], ids=["context apart", "one message", "no template"])
def test_what_every_prompt_says_is_no_conversation(engine: ProphetKVEngine, role: str | None) -> None:
    """The instructions behind the context would be found in any former prompt, computed behind its chunks."""

    def sent(chunks: Any, question: str) -> Any:
        context = "Read: " + "\n\n".join(chunks) + INSTRUCTIONS
        if role is None:
            return context + question
        return [user(context + question)] if role == "user" else [{"role": role, "content": context}, user(question)]

    engine.generate(sent(CONTEXTS[0], "How many planes shall be produced?"), max_new_tokens=2)
    report = engine.generate(sent(CONTEXTS[1], "Who watches the fox jump?"), max_new_tokens=2).report
    assert report.moved_tokens == 0
    assert report.fresh_tokens > 40
    assert len(report.chunks) == 2


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_the_latest_messages_are_computed(engine: ProphetKVEngine, pairs: int) -> None:
    """However long the history is: so many of its last tokens, to which a question refers first, are no stale ones."""
    assert continuing.RECENT == 128
    said = (SAID * 3)[:pairs]
    engine.generate(messages(CONTEXTS[0], said), max_new_tokens=2)
    sent = messages(CONTEXTS[1], said)
    start, stop = history_of(engine, sent)
    with counted_rows(engine) as rows:
        result = engine.prefill(sent, recompute_ratio=0.1, remember=True)
    report = result.report
    assert report.moved_tokens == max(0, stop - start - 128)
    assert (report.moved_tokens > 0) == (pairs == 3)
    states = result.answered.states
    assert bool((states[start + report.moved_tokens : stop] == int(RowState.COMPUTED)).all())
    assert rows[-1] == report.fresh_tokens + report.recomputed_tokens > 128 * (pairs == 3)


def test_ratio_bounds_what_is_recomputed_of_it(engine: ProphetKVEngine) -> None:
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    sent, found = messages(CONTEXTS[1]), []
    for ratio in (0.0, 0.3, 0.9):
        report = engine.prefill(sent, recompute_ratio=ratio, remember=True, tenant="").report
        found.append(report)
        engine.conversations.forget()
        engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    assert [report.recomputed_tokens for report in found] == [int(r * found[0].chunk_tokens) for r in (0.0, 0.3, 0.9)]
    assert {report.moved_tokens for report in found} == {found[0].moved_tokens}


def test_the_question_chooses_among_messages_too(engine: ProphetKVEngine) -> None:
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    sent = messages(CONTEXTS[1])
    start, stop = history_of(engine, sent)
    result = engine.prefill(sent, recompute_ratio=0.3, remember=True)
    scores = torch.from_numpy(result.view().scores)
    assert (scores[start:stop] > 0).all()
    recomputed = set(result.recomputed.tolist())
    assert recomputed & set(range(start, stop))
    assert recomputed & set(range(start))
    is_open = engine.read(sent).is_chunk.clone()
    is_open[start:stop] = True
    assert recomputed == set(torch.topk(torch.where(is_open, scores, -1), len(recomputed)).indices.tolist())


def test_full_prefill_and_ratio_one_use_none(engine: ProphetKVEngine) -> None:
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    for settings in ({"recompute_ratio": 1.0}, {"strategy": "full_prefill"}):
        anew = engine.prefill(messages(CONTEXTS[1]), **settings)
        told = engine.prefill(messages(CONTEXTS[1]), remember=True, tenant="", **settings)
        assert told.report.moved_tokens == told.report.remembered_tokens == 0
        assert torch.equal(anew.logits, told.logits)
        engine.conversations.forget()
        engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)


def test_switched_off_there_is_none(engine: ProphetKVEngine) -> None:
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    assert engine.generate(messages(CONTEXTS[1]), max_new_tokens=2, remember=False).report.moved_tokens == 0
    off = make_engine(remember=False)
    reports = [off.generate(messages(chunks), max_new_tokens=2).report for chunks in CONTEXTS]
    assert [report.moved_tokens for report in reports] == [0, 0, 0]


def test_prompts_without_chunks_stay_exact(engine: ProphetKVEngine) -> None:
    """A history that lost its oldest messages is computed, as it always was: nothing stale gets into such a prompt."""
    engine.generate(messages((), SAID), max_new_tokens=2)
    result = engine.prefill(messages((), SAID[1:]), remember=True)
    assert result.report.moved_tokens == result.report.reused_tokens == 0
    truth, _ = full_prefill(engine.model, result.input_ids)
    torch.testing.assert_close(result.logits, truth, atol=1e-3, rtol=1e-3)


def test_an_answer_that_comes_back_altered_moves_nothing(engine: ProphetKVEngine) -> None:
    """Its context is what it was: what follows the change is computed, as ever."""
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    altered = [("Well: " + asked, told) for asked, told in SAID]
    report = engine.generate(messages(CONTEXTS[0], altered), max_new_tokens=2).report
    assert report.moved_tokens == 0
    assert report.remembered_tokens > 0


def test_context_that_only_lost_a_chunk_changed_too(engine: ProphetKVEngine) -> None:
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    sent = messages(CONTEXTS[0][:1])
    report = engine.generate(sent, max_new_tokens=2).report
    assert [chunk.status for chunk in report.chunks] == ["remembered"]
    assert report.moved_tokens > 100
    assert sum_of(report) == report.prompt_tokens


def test_context_that_comes_back_has_the_history_that_grew_meanwhile(engine: ProphetKVEngine) -> None:
    """The chunks are remembered from long ago; what was said since then stood behind others."""
    for number, chunks in enumerate((*CONTEXTS[:2], CONTEXTS[0])):
        said = SAID[: number + 1]
        report = engine.generate(messages(chunks, said, QUESTION + str(number)), max_new_tokens=2).report
    assert {chunk.status for chunk in report.chunks} == {"remembered"}
    assert report.moved_tokens > 20
    assert report.fresh_tokens < 60 + len(engine.tokenizer("".join(SAID[2]))["input_ids"])


def test_tenants_find_their_own_messages_only(engine: ProphetKVEngine) -> None:
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2, tenant="alice")
    counts = []
    for tenant in ("bob", "nobody", "alice"):
        with counted_rows(engine) as rows:
            report = engine.prefill(messages(CONTEXTS[1]), remember=True, tenant=tenant).report
        counts.append((report.moved_tokens, tuple(rows)))
    assert counts[0] == counts[1]  # nor does it cost otherwise
    assert counts[0][0] == 0 < counts[2][0]
    engine.conversations.forget("alice")
    assert engine.prefill(messages(CONTEXTS[2]), remember=True, tenant="alice").report.moved_tokens == 0


def test_it_takes_no_room(engine: ProphetKVEngine) -> None:
    """Nothing is held for finding: the bytes are those of the rows alone, and within the limit."""
    for chunks in CONTEXTS:
        engine.generate(messages(chunks), max_new_tokens=2)
    held = [part for root in engine.conversations._roots.values() for node in root.below()
            for pair in node.rows for part in pair]  # fmt: skip
    stats = engine.conversations.stats()
    assert sum(part.untyped_storage().nbytes() for part in held) == stats.nbytes
    engine.conversations.forget()
    assert engine.conversations.stats().nbytes == 0
    assert engine.generate(messages(CONTEXTS[0]), max_new_tokens=2).report.moved_tokens == 0


# What is said of such rows afterwards.


def test_moved_rows_are_stale_until_they_are_recomputed(engine: ProphetKVEngine) -> None:
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    sent = messages(CONTEXTS[1])
    start, stop = history_of(engine, sent)
    result = engine.prefill(sent, recompute_ratio=0.3, remember=True)
    held, _ = kept_rows(engine, result.input_ids)
    ran = torch.zeros(held.length, dtype=torch.bool)
    ran[result.recomputed] = True
    states = held.states[start:stop]
    assert set(states[~ran[start:stop]].tolist()) == {int(RowState.MOVED)}
    assert set(states[ran[start:stop]].tolist()) == {int(RowState.COMPUTED)}
    assert int(RowState.EXACT) not in held.states[start:].tolist()


def test_the_next_turn_goes_on_from_them(engine: ProphetKVEngine) -> None:
    """They are remembered then, at their places; those that are stale still may be chosen, and each only once."""
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    chat = Chat(engine, recompute_ratio=0.3)
    chat.messages = messages(CONTEXTS[1])[:-1]
    first = chat.ask(QUESTION).report
    assert first.moved_tokens > 100
    seen: set[int] = set()
    for question in ("And on Friday, what is known?", "How many guns?", "Thank you; anything else?"):
        ids = prompt_ids(engine, [*chat.messages, user(question)])
        held, _ = kept_rows(engine, ids)
        result = engine.prefill([*chat.messages, user(question)], recompute_ratio=0.3, remember=True)
        assert result.report.moved_tokens == 0
        assert result.report.fresh_tokens < 60
        rows = set(result.recomputed.tolist())
        assert rows
        assert not rows & seen
        assert (held.states[sorted(rows)] < int(RowState.COMPUTED)).all()
        seen |= rows
        chat.ask(question, recompute_ratio=0.3)
    start, stop = history_of(engine, messages(CONTEXTS[1]))
    assert seen & set(range(start, stop))


def test_they_may_move_again(engine: ProphetKVEngine) -> None:
    for chunks in (*CONTEXTS, *CONTEXTS[:2]):
        report = engine.prefill(messages(chunks, question=QUESTION + str(len(chunks))), remember=True).report
        assert sum_of(report) == report.prompt_tokens
    assert report.remembered_tokens > 100


def test_a_deleted_chunk_takes_along_the_messages_that_stood_behind_it(engine: ProphetKVEngine) -> None:
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    sent = messages(CONTEXTS[1])
    start, _ = history_of(engine, sent)
    assert engine.generate(sent, max_new_tokens=2).report.moved_tokens > 0
    assert engine.conversations.match(prompt_ids(engine, sent)[0], "").length > start
    engine.remove_chunks([engine.key_of(CONTEXTS[0][0])])  # it stands in no prompt that is kept behind the second one
    assert engine.conversations.match(prompt_ids(engine, sent)[0], "").length <= start
    assert engine.generate(sent, max_new_tokens=2).report.moved_tokens == 0


def test_a_deleted_chunks_messages_are_not_found(engine: ProphetKVEngine) -> None:
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    engine.store.delete([engine.key_of(CONTEXTS[0][1])])  # behind the engine's back
    assert engine.prefill(messages(CONTEXTS[1]), remember=True).report.moved_tokens == 0


def test_they_survive_a_restart(engine: ProphetKVEngine, tmp_path: Path) -> None:
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    engine.save_conversation(tmp_path / "chat")
    other = make_engine()
    other.load_conversation(tmp_path / "chat")
    one, two = (each.prefill(messages(CONTEXTS[1]), remember=True) for each in (engine, other))
    assert one.report.moved_tokens == two.report.moved_tokens > 0
    assert torch.equal(one.logits, two.logits)


def test_what_was_moved_is_shown(engine: ProphetKVEngine) -> None:
    engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
    result = engine.prefill(messages(CONTEXTS[1]), recompute_ratio=0.3, remember=True)
    report = result.report
    assert f" recomputed ({report.moved_tokens} of these two from former messages) + " in str(report)
    view = result.view()
    moved = [segment for segment in view.segments if segment.status == "moved"]
    assert sum(len(segment.tokens) for segment in moved) == report.moved_tokens
    assert SAID[0][1] in "".join(segment.text for segment in moved)
    assert "".join(segment.text for segment in view.segments) == engine.tokenizer.decode(view.token_ids)
    recomputed = sum(token.recomputed for segment in view.segments for token in segment.tokens)
    assert recomputed == report.recomputed_tokens
    html = report.to_html()
    assert "from the conversation, where it stood elsewhere, " in html
    assert f"({report.moved_tokens} of these two from former messages)" in html


# How close to full prefill they are, and that their positions are right.


@pytest.mark.parametrize("wrong_by", [40, None])
def test_moved_messages_are_far_closer_to_full_prefill_than_misplaced_ones(
    monkeypatch: pytest.MonkeyPatch, wrong_by: int | None
) -> None:
    """Three models, two contexts, nothing recomputed: right, and rotated by 40 positions too many, or not at all."""

    def misplaced(position_ids: torch.Tensor) -> RopeTables:
        return RopeTables(torch.zeros_like(position_ids) if wrong_by is None else position_ids + wrong_by)

    found = {"right": 0.0, "wrong": 0.0}
    for seed in range(3):
        for chunks in CONTEXTS[1:]:
            for kind in found:
                engine = make_engine(seed)
                engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
                with monkeypatch.context() as patched:
                    if kind == "wrong":
                        patched.setattr("prophetkv_rag.conversations.moving.RopeTables", misplaced)
                    result = engine.prefill(messages(chunks), recompute_ratio=0.0, remember=True)
                assert result.report.moved_tokens > 100
                truth, _ = full_prefill(engine.model, result.input_ids)
                found[kind] += divergence(result.logits, truth)
    assert found["right"] < found["wrong"] / 3


def test_recomputing_brings_them_closer() -> None:
    total = {0.0: 0.0, 0.5: 0.0}
    for seed in range(3):
        for ratio in total:
            engine = make_engine(seed)
            engine.generate(messages(CONTEXTS[0]), max_new_tokens=2)
            result = engine.prefill(messages(CONTEXTS[1]), recompute_ratio=ratio, remember=True)
            total[ratio] += divergence(result.logits, full_prefill(engine.model, result.input_ids)[0])
    assert total[0.5] < total[0.0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "smollm3", "phi", "cohere2", "glm4", "olmo3"])
@pytest.mark.parametrize("shift", [-30, 0, 250])
def test_moving_equals_the_models_own_rows_there(name: str, shift: int) -> None:
    """The model itself, given other positions, is the reference: its rows must be what moving makes of them."""
    model = families.SUPPORTED[name]()
    engine = ProphetKVEngine(model, None)
    ids = torch.randint(1, families.VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(3))

    def rows_at(first: int) -> Any:
        cache = DynamicCache()
        positions = torch.arange(first, first + ids.shape[1])[None]
        with torch.no_grad():
            model(ids, position_ids=positions, **cache_argument(model, cache), use_cache=True)
        return [(layer.keys[0], layer.values[0]) for layer in cache.layers]

    before, expected = rows_at(30), rows_at(30 + shift)
    room = [RowsLayer(*(torch.zeros(1, part.shape[0], 400, part.shape[2]) for part in pair)) for pair in before]
    start = 30 + shift
    part = Part(30, before, torch.zeros(40, dtype=torch.int64))
    MovedRows(start + 5, start + 40, shift, frozenset(), [part]).put_into(room, engine.support)
    for layer, (keys, values) in zip(room, expected, strict=True):
        torch.testing.assert_close(layer.keys[0, :, start + 5 : start + 40], keys[:, 5:], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(layer.values[0, :, start + 5 : start + 40], values[:, 5:], atol=2e-4, rtol=2e-4)
        assert not layer.keys[0, :, : start + 5].any()


def test_moving_is_a_rotation_in_float64_rounded_once(engine: ProphetKVEngine) -> None:
    """Un-rotating and rotating again, both in float64, by this test's own arithmetic."""
    rotation = engine.support.layers[0].rotation
    assert rotation is not None
    assert not rotation.interleaved
    keys = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(1))
    old, new = torch.arange(7000, 7020), torch.arange(90, 110)
    frequencies = torch.tensor(rotation.inv_freq, dtype=torch.float64)

    def turned(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions.double()[:, None] * frequencies
        one, two = states.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)

    expected = turned(turned(keys.double(), -old), new)
    room = [RowsLayer(torch.zeros(1, 2, 200, 16), torch.zeros(1, 2, 200, 16))]
    support: Any = SimpleNamespace(layers=engine.support.layers[:1])
    part = Part(7000, [(keys, keys)], torch.zeros(20, dtype=torch.int64))
    MovedRows(90, 110, 90 - 7000, frozenset(), [part]).put_into(room, support)
    torch.testing.assert_close(room[0].keys[0, :, 90:110].double(), expected, atol=1e-6, rtol=1e-6)


# What is found, against a search of every place.


def tree_of(sequences: list[list[int]], traces: list[list[Trace]] | None = None) -> Node:
    """A tree whose keys say where a row stands, and whose values which token it is."""
    root = Node.root()
    for number, ids in enumerate(sequences):
        places, tokens = torch.arange(len(ids), dtype=torch.float32), torch.tensor(ids, dtype=torch.float32)
        new = NewRows(
            torch.tensor(ids),
            torch.full((len(ids),), int(RowState.EXACT), dtype=torch.uint8),
            traces[number] if traces else [],
            frozenset(),
            [RowsLayer(places[None, None, :, None], tokens[None, None, :, None])],
            copies=True,
        )
        insert(root, new, number + 1)
    return root


def found_by_trying(sequences: list[list[int]], ids: list[int], free: list[bool]) -> list[tuple[int, int]]:
    spans, place = [], 0
    while place < len(ids):
        longest = 0
        for other in sequences:
            for start in range(len(other)):
                length = 0
                while (
                    place + length < len(ids)
                    and start + length < len(other)
                    and free[place + length]
                    and ids[place + length] == other[start + length]
                ):
                    length += 1
                longest = max(longest, length)
        if longest >= SHORTEST:
            spans.append((place, place + longest))
            place += longest
        else:
            place += 1
    return spans


def check_rows(one: MovedRows, ids: list[int]) -> None:
    room = [RowsLayer(*(torch.full((1, 1, len(ids), 1), -1.0) for _ in range(2)))]
    support: Any = SimpleNamespace(layers=[SimpleNamespace(rotation=None)])
    one.put_into(room, support)
    there = torch.arange(one.start, one.stop) - one.shift
    assert torch.equal(room[0].keys[0, 0, one.start : one.stop, 0], there.float())
    assert room[0].values[0, 0, one.start : one.stop, 0].tolist() == ids[one.start : one.stop]
    assert int((room[0].values >= 0).sum()) == one.stop - one.start


def test_what_is_found_is_what_trying_every_place_finds() -> None:
    draw = random.Random(5)
    kinds = 0
    for _ in range(40):
        sizes = [draw.randrange(10, 60) for _ in range(6)]
        texts = [[draw.randrange(3 if draw.random() < 0.1 else 50) for _ in range(size)] for size in sizes]
        sequences = [list(chain(*draw.choices(texts, k=draw.randrange(1, 5)))) for _ in range(5)]
        begun = sequences[0]
        sequences += [begun + texts[1], begun[: len(begun) // 2] + texts[2]]  # nodes are cut
        ids = [*chain(*draw.choices(texts, k=4)), 99, *texts[0]]
        free = [draw.random() > 0.01 for _ in ids]
        found = find_moved(tree_of(sequences), torch.tensor(ids), torch.tensor(free), chunk_starts=[-1], held=-1)
        assert [(one.start, one.stop) for one in found] == found_by_trying(sequences, ids, free)
        kinds += len(found)
        for one in found:
            check_rows(one, ids)
    assert kinds > 60


def test_windows_that_only_look_alike_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes that are the same for nearly everything: what is found is of the very tokens all the same."""

    def poor(ids: Any) -> Any:
        return (ids[: max(0, len(ids) - SHORTEST + 1)] % 2).astype("uint64")

    monkeypatch.setattr("prophetkv_rag.conversations.moving._window_hashes", poor)
    monkeypatch.setattr("prophetkv_rag.conversations.moving._MAX_CANDIDATES", 10**6)
    monkeypatch.setattr("prophetkv_rag.conversations.moving._MAX_COMPARISONS", 10**9)
    draw = random.Random(2)
    for _ in range(20):
        texts = [[draw.randrange(4) for _ in range(30)] for _ in range(3)]
        sequences = [texts[0] + texts[1], texts[0] + texts[2], texts[0][:20] + texts[1]]
        ids = [*texts[1][:9], *texts[2], 9, *texts[0][12:], *texts[2][:12]]
        free = torch.ones(len(ids), dtype=torch.bool)
        found = find_moved(tree_of(sequences), torch.tensor(ids), free, chunk_starts=[-1], held=-1)
        assert [(one.start, one.stop) for one in found] == found_by_trying(sequences, ids, free.tolist())
        for one in found:
            check_rows(one, ids)


def test_rows_bear_the_traces_of_all_that_stood_before_them() -> None:
    draw = random.Random(1)
    ids = [draw.randrange(500) for _ in range(100)]
    key = [character * 64 for character in "abc"]
    traces = [[Trace(10, frozenset(key[:1])), Trace(40, frozenset(key[1:2])), Trace(80, frozenset(key[2:]))]]
    root = tree_of([ids, [*ids[:50], *[7] * 20]], [traces[0], traces[0][:2]])
    prompt = torch.tensor([*[501] * 5, *ids[45:75]])
    (found,) = find_moved(root, prompt, torch.ones(35, dtype=torch.bool), chunk_starts=[-1], held=-1)
    assert (found.start, found.stop, found.shift) == (5, 35, -40)
    assert found.keys == {key[0], key[1]}


def test_behind_the_same_chunks_nothing_is_taken_to_be_stale() -> None:
    draw = random.Random(1)
    ids = [draw.randrange(500) for _ in range(100)]
    traces = [Trace(start, frozenset([str(start) * 32])) for start in (10, 40)]
    root = tree_of([ids], [traces])

    def find(begun: int, chunk_starts: list[int], held: int) -> int:
        """How much is found of what follows position 60, in a prompt that begins as the former one up to `begun`."""
        prompt = torch.tensor([*ids[:begun], 501, 502, *ids[60:90]])
        free = torch.ones(len(prompt), dtype=torch.bool)
        free[: begun + 2] = False
        found = find_moved(root, prompt, free, chunk_starts=chunk_starts, held=held)
        return sum(one.stop - one.start for one in found)

    assert find(55, [10, 40], 55) == 0  # something was said otherwise, behind both
    assert find(35, [10], 35) == 30  # the second chunk stands here no more
    assert find(10, [10], 10) == 30  # another one stands here in the first one's place
    assert find(55, [10, 40], 30) == 30  # the second one comes from its own cache here, as nobody goes on from it


def test_a_prompt_made_to_be_slow_is_not() -> None:
    """The same token over and over, in many conversations: what is compared is bounded."""
    root = tree_of([[number, *[7] * 3000] for number in range(100, 140)])
    prompt = torch.tensor([*[7] * 40, 8] * 100)
    found = find_moved(root, prompt, torch.ones(len(prompt), dtype=torch.bool), chunk_starts=[-1], held=-1)
    assert all(one.stop - one.start == 40 for one in found)


def test_without_a_tokenizer_nobody_knows_where_messages_begin() -> None:
    engine = ProphetKVEngine(tiny_llama(), None)
    chunks = [list(range(100, 130)), list(range(200, 230))]
    engine.add_chunks(chunks)
    said = [5, 9, 33, 8, 51, 4, 77, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72]
    engine.prefill(Prompt([1, 3], [chunks[0]], [*said, 80, 81], query=[80, 81]), remember=True)
    report = engine.prefill(Prompt([1, 3], [chunks[1]], [*said, 90, 91], query=[90, 91]), remember=True).report
    assert report.moved_tokens == 0
    assert sum_of(report) == report.prompt_tokens
