"""Whose rows are found, what a delete takes along, and how much is kept."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine, StoreError
from prophetkv_rag.store.disk.store import DiskStore
from tests.conversations.chats import CHUNKS, QUESTIONS, Chat, counted_rows, kept_rows, prompt_ids, user, with_context
from tests.forked import forked
from tests.tiny import tiny_llama, tiny_tokenizer

ROW_BYTES = 3 * 2 * 2 * 16 * 4  # layers, K and V, heads, dims, fp32


def make_engine(store: Any = None, **settings: Any) -> ProphetKVEngine:
    return ProphetKVEngine(tiny_llama(), tiny_tokenizer(), store=store, config=ProphetKVConfig(**settings))


@pytest.fixture
def engine() -> ProphetKVEngine:
    made = make_engine()
    made.add_chunks(CHUNKS)
    return made


def remembered(engine: ProphetKVEngine, chat: Chat, **settings: Any) -> int:
    """Tokens that the next turn would take over."""
    messages = [*chat.messages, user(QUESTIONS[5])]
    return engine.prefill(messages, remember=True, **settings).report.remembered_tokens


def test_tenants_with_the_same_texts_share_no_row(engine: ProphetKVEngine) -> None:
    """What is counted are rows: a tenant can neither see nor time what another one asked."""
    chats = [Chat(engine, tenant=tenant) for tenant in ("left", "right", "")]
    rows_of = []
    for chat in chats:
        with counted_rows(engine) as rows:
            reports = [chat.ask(with_context(QUESTIONS[0])).report, chat.ask(QUESTIONS[1]).report]
        rows_of.append(rows)
        assert reports[0].remembered_tokens == 0 < reports[1].remembered_tokens
    assert rows_of[0] == rows_of[1] == rows_of[2]
    one, other = (kept_rows(engine, prompt_ids(engine, chats[0].messages), tenant)[1] for tenant in ("left", "right"))
    assert one[0][0].shape[1] > 0
    assert engine.conversations.stats().tenants == 3
    assert engine.conversations.stats("left") == engine.conversations.stats("right")
    engine.conversations.forget("left")
    assert engine.conversations.stats("left").tokens == 0 < engine.conversations.stats("right").tokens
    assert torch.equal(kept_rows(engine, prompt_ids(engine, chats[1].messages), "right")[1][0][0], other[0][0])


def test_engines_of_two_namespaces_share_no_row() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    engines = [ProphetKVEngine(model, tokenizer, config=ProphetKVConfig(namespace=name)) for name in ("a", "b")]
    first, second = (Chat(one).ask(QUESTIONS[0]).report for one in engines)
    assert first.remembered_tokens == second.remembered_tokens == 0


def test_nothing_is_left_after_forget(engine: ProphetKVEngine) -> None:
    chat = Chat(engine)
    chat.ask(with_context(QUESTIONS[0]))
    chat.ask(QUESTIONS[1])
    parts = engine.conversations.match(prompt_ids(engine, chat.messages)[0], "").parts
    rows = [weakref.ref(tensor) for part in parts for pair in part.rows for tensor in pair]
    del parts
    assert all(row() is not None for row in rows)
    engine.conversations.forget()
    gc.collect()
    assert [row for row in rows if row() is not None] == []
    stats = engine.conversations.stats()
    assert (stats.tenants, stats.runs, stats.tokens, stats.nbytes) == (0, 0, 0, 0)
    assert remembered(engine, chat) == 0


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_deleted_chunk_takes_along_what_stands_behind_it(engine: ProphetKVEngine, which: int) -> None:
    chat = Chat(engine)
    chat.ask(with_context(QUESTIONS[0]))
    chat.ask(QUESTIONS[1])
    start = engine.read(chat.messages).chunks[which].start
    assert engine.conversations.stats().tokens > start
    assert engine.remove_chunks([engine.key_of(CHUNKS[which])])
    assert engine.conversations.stats().tokens == start  # at once
    report = engine.prefill([*chat.messages, user(QUESTIONS[5])], remember=True).report
    assert report.remembered_tokens <= start
    assert [chunk.status for chunk in report.chunks] == ["remembered"] * which + ["hit"] * (2 - which)


def test_a_chunk_that_others_still_refer_to_stays(engine: ProphetKVEngine) -> None:
    engine.add_chunks(CHUNKS[:1], owner="other")
    chat = Chat(engine)
    chat.ask(with_context(QUESTIONS[0]))
    tokens = engine.conversations.stats().tokens
    assert engine.remove_chunks([engine.key_of(CHUNKS[0])]) == []
    assert engine.conversations.stats().tokens == tokens


def test_what_the_store_itself_deletes_is_not_used_any_more(engine: ProphetKVEngine) -> None:
    chat = Chat(engine)
    chat.ask(with_context(QUESTIONS[0]))
    start = engine.read(chat.messages).chunks[0].start
    engine.store.delete([engine.key_of(CHUNKS[0])])
    assert remembered(engine, chat) <= start


def test_what_another_process_deletes_is_not_used_any_more(tmp_path: Path) -> None:
    mine, other = (make_engine(DiskStore(tmp_path / "blobs")) for _ in range(2))
    mine.add_chunks(CHUNKS)
    chat = Chat(mine)
    chat.ask(with_context(QUESTIONS[0]))
    chat.ask(QUESTIONS[1])
    start = mine.read(chat.messages).chunks[1].start
    assert remembered(mine, chat) > start
    assert other.remove_chunks([other.key_of(CHUNKS[1])])
    assert remembered(mine, chat) <= start
    mine.store.close()
    other.store.close()


def test_a_chunk_takes_along_what_was_encoded_behind_it() -> None:
    """The rows of the second chunk bear the first one's trace, though its text is nowhere in the prompt."""
    engine = make_engine(encoding="previous:1", first_chunk="cached")
    engine.add_chunks(CHUNKS)
    chat = Chat(engine)
    chat.ask(with_context(QUESTIONS[0], CHUNKS[1:2]))
    start = engine.read(chat.messages).chunks[0].start
    assert remembered(engine, chat) > start
    engine.remove_chunks([engine.key_of(CHUNKS[0])])
    assert remembered(engine, chat) <= start


def test_a_chunk_deleted_while_its_answer_is_written_leaves_nothing(engine: ProphetKVEngine) -> None:
    messages = [user(with_context(QUESTIONS[0]))]
    pieces = engine.stream(messages, max_new_tokens=8)
    next(pieces)
    start = engine.read(messages).chunks[0].start
    engine.remove_chunks([engine.key_of(CHUNKS[0])])
    list(pieces)
    assert engine.conversations.stats().tokens == start


def test_full_prefills_rows_go_with_the_chunk_too(engine: ProphetKVEngine) -> None:
    """No cache was used, but the text is there."""
    chat = Chat(engine, strategy="full_prefill")
    chat.ask(with_context(QUESTIONS[0]))
    start = engine.read(chat.messages).chunks[0].start
    engine.remove_chunks([engine.key_of(CHUNKS[0])])
    assert engine.conversations.stats().tokens == start


def test_a_chunk_that_was_never_added_is_no_ones_to_delete(engine: ProphetKVEngine) -> None:
    text = "This text is a chunk of one prompt alone, and stored nowhere at all."
    first, second = (
        engine.prefill(Prompt("Read: ", [text], suffix), remember=True).report
        for suffix in (" Answer: what", " Answer: what and who")
    )
    assert [chunk.status for chunk in first.chunks] == ["miss"]
    assert [chunk.status for chunk in second.chunks] == ["remembered"]


def test_stale_rows_of_a_text_that_is_no_chunk_of_this_prompt_are_computed(engine: ProphetKVEngine) -> None:
    """They could not be chosen any more, so a later prompt does not go on from them."""
    text = "This text is a chunk of one prompt alone, and stored nowhere at all."
    whole = Prompt("Read: ", [text], " Answer: what")
    ids = engine.prefill(whole, remember=True).input_ids[0].tolist()
    start = engine.read(whole).chunks[0].start
    report = engine.prefill(Prompt(ids, [], " and who"), remember=True).report
    assert report.remembered_tokens <= start


def test_who_cannot_tell_what_was_deleted_takes_over_nothing(engine: ProphetKVEngine) -> None:
    chat = Chat(engine)
    chat.ask(with_context(QUESTIONS[0]))

    def fail(_: Any) -> set[str]:
        msg = "the catalog cannot be read"
        raise StoreError(msg)

    engine.conversations._known = fail
    assert remembered(engine, chat) <= engine.read(chat.messages).chunks[0].start


def test_a_thousand_conversations_stay_within_the_limit() -> None:
    limit = 300 * ROW_BYTES
    engine = make_engine(remember_bytes=limit, max_prompt_tokens=400)
    most = 0
    for number in range(1000):
        engine.generate(f"{number}: {QUESTIONS[number % 10]}", max_new_tokens=1)
        most = max(most, engine.conversations.stats().nbytes)
    assert limit / 2 < most <= limit
    nodes = [node for root in engine.conversations._roots.values() for node in root.below()]
    held = [part for node in nodes for pair in node.rows for part in pair]
    assert sum(part.untyped_storage().nbytes() for part in held) <= limit  # views keep nothing alive
    newest = engine.prefill(f"999: {QUESTIONS[9]}", remember=True).report
    oldest = engine.prefill(f"17: {QUESTIONS[7]}", remember=True).report
    assert newest.remembered_tokens == newest.prompt_tokens - 1
    assert oldest.remembered_tokens < oldest.prompt_tokens / 4


def test_the_least_recently_used_goes_first() -> None:
    texts = [f"{name}: {QUESTIONS[0]} {QUESTIONS[1]}" for name in ("one", "two", "three")]
    engine = make_engine()
    sizes = [engine.generate(text, max_new_tokens=1).report.prompt_tokens for text in texts]
    engine = make_engine(remember_bytes=(sum(sizes) - 10) * ROW_BYTES)
    for text in (texts[0], texts[1], texts[0], texts[2]):
        engine.generate(text, max_new_tokens=1)
    lengths = [engine.conversations.match(engine.read(text).input_ids, "").length for text in texts]
    assert (lengths[0], lengths[2]) == (sizes[0], sizes[2])
    assert lengths[1] < sizes[1]


def test_a_tenant_that_keeps_to_its_share_is_not_driven_out() -> None:
    engine = make_engine(remember_bytes=200 * ROW_BYTES)
    quiet = Chat(engine, tenant="quiet", max_new_tokens=2)
    kept = quiet.ask(QUESTIONS[0]).report.prompt_tokens
    assert kept < 100
    for number in range(20):
        engine.generate(f"{number}: {QUESTIONS[number % 10]} {QUESTIONS[1]}", max_new_tokens=2, tenant="loud")
    assert engine.conversations.stats("quiet").tokens >= kept
    assert engine.conversations.stats().nbytes <= 200 * ROW_BYTES


def test_of_a_prompt_that_is_too_long_its_beginning_is_kept() -> None:
    engine = make_engine(remember_bytes=50 * ROW_BYTES)
    report = engine.generate(with_context(QUESTIONS[0]), max_new_tokens=2).report
    assert report.prompt_tokens > 50
    assert engine.conversations.stats().tokens == 50
    assert engine.generate(with_context(QUESTIONS[0]), max_new_tokens=2).report.remembered_tokens == 50


def test_prompts_that_begin_alike_share_their_beginning(engine: ProphetKVEngine) -> None:
    texts = [f"You are a librarian who knows every book there is. {question}" for question in QUESTIONS[:4]]
    reports = [engine.generate(text, max_new_tokens=1).report for text in texts]
    assert reports[0].remembered_tokens == 0
    shared = [report.remembered_tokens for report in reports[1:]]
    assert min(shared) > 10
    apart = sum(report.prompt_tokens for report in reports)
    assert engine.conversations.stats().tokens == apart - sum(shared)


def test_a_limit_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="remember_bytes is -1; it must be 0"):
        ProphetKVConfig(remember_bytes=-1)
    assert make_engine(remember_bytes=0).generate(QUESTIONS[0], max_new_tokens=2).report.remembered_tokens == 0


def test_a_forked_child_goes_on_from_its_parents_conversation(engine: ProphetKVEngine) -> None:
    chat = Chat(engine)
    chat.ask(QUESTIONS[0])
    assert forked(lambda: remembered(engine, chat)) == remembered(engine, chat) > 0
