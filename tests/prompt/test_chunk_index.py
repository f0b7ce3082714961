from __future__ import annotations

import gc
import hashlib
import logging
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prophetkv_rag.prompt import chunk_index as module
from prophetkv_rag.prompt.chunk_index import ChunkIndex, Match, text_entry
from prophetkv_rag.store.text_entry import EntryColumns


def key_of(text: str) -> str:
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).hexdigest()


def index_of(*texts: str) -> ChunkIndex:
    index = ChunkIndex()
    for text in texts:
        entry = text_entry(text)
        if entry is not None:
            index.add(key_of(text), entry)
    return index


def brute_force(texts: list[str], prompt: str) -> list[Match]:
    """The definition: from left to right, the longest registered text that stands here, then on behind it."""
    registered = sorted({text.strip() for text in texts if len(text.strip()) >= 8}, key=len, reverse=True)
    matches, start = [], 0
    while start < len(prompt):
        found = next((text for text in registered if prompt.startswith(text, start)), None)
        if found is not None:
            matches.append(Match(start, start + len(found), key_of(found)))
        start += 1 if found is None else len(found)
    return matches


# Few letters, so that texts overlap, contain each other and share long prefixes; and what splits code points or lines.
PIECES = st.sampled_from(
    ["a", "b", "ab", "a" * 8, "ab" * 16, " ", "\n", "\r\n", "é", "e\u0301", "😀", "\ud83d", "\u2003", "\0"]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=24).map("".join)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[str], str]:
    texts = draw(st.lists(TEXTS, min_size=1, max_size=8))
    base = draw(st.sampled_from(texts))
    texts += draw(st.lists(TEXTS.map(lambda tail: base + tail), max_size=4))  # share a prefix with another text
    texts += [draw(st.sampled_from(texts))[draw(st.integers(0, 9)) :] for _ in range(draw(st.integers(0, 3)))]
    parts = draw(st.lists(st.one_of(st.sampled_from(texts), TEXTS, PIECES), max_size=12))
    return texts, "".join(parts)


@settings(max_examples=600, deadline=None)
@given(prompts())
def test_finds_what_brute_force_finds(case: tuple[list[str], str]) -> None:
    texts, prompt = case
    index = index_of(*texts)
    assert index.find(prompt) == brute_force(texts, prompt)


@settings(max_examples=200, deadline=None)
@given(prompts(), st.data())
def test_removed_texts_are_not_found_and_all_others_still_are(case: tuple[list[str], str], data: st.DataObject) -> None:
    texts, prompt = case
    removed = set(data.draw(st.lists(st.sampled_from(texts)).map(lambda some: [text.strip() for text in some])))
    index = index_of(*texts)
    for text in removed:
        index.remove(key_of(text))
    left = [text for text in texts if text.strip() not in removed]
    assert index.find(prompt) == brute_force(left, prompt)
    for text in left:
        index.remove(key_of(text))
    assert len(index) == 0
    assert not any(index._anchors.values())


@settings(max_examples=300, deadline=None)
@given(prompts(), st.data())
def test_loading_many_at_once_is_adding_them_one_by_one(case: tuple[list[str], str], data: st.DataObject) -> None:
    """Also with texts that begin alike, that are there twice, that share a key, and with some known before."""
    texts, prompt = case
    pairs = [(key_of(text), entry) for text in texts if (entry := text_entry(text)) is not None]
    if pairs and data.draw(st.booleans()):
        pairs = list(dict(pairs).items())  # as a catalog has them; otherwise a text may come twice
    if len(pairs) > 1 and data.draw(st.booleans()):
        pairs.append((pairs[0][0], pairs[1][1]))
    first = data.draw(st.integers(0, len(pairs)) | st.just(0))
    loaded, added = ChunkIndex(), ChunkIndex()
    for key, entry in pairs[:first]:
        loaded.add(key, entry)
    loaded.load(EntryColumns.of(pairs[first:]))
    for key, entry in pairs:
        added.add(key, entry)
    assert loaded.find(prompt) == added.find(prompt)
    for key, _ in data.draw(st.permutations(pairs)):
        loaded.remove(key)
        added.remove(key)
        assert (len(loaded), loaded.find(prompt)) == (len(added), added.find(prompt))
    assert not any(loaded._anchors.values())
    assert not any((loaded._begins, loaded._sizes, loaded._digests))


def test_loading_makes_no_container_for_every_text() -> None:
    """The garbage collector looks at containers: of 2,000 texts that begin differently there are none."""
    texts = [f"{number:04}: a text that begins as no other text here does" for number in range(2000)]
    pairs = [(key_of(text), entry) for text in texts if (entry := text_entry(text)) is not None]
    index, columns = ChunkIndex(), EntryColumns.of(pairs)
    gc.collect()
    before = len(gc.get_objects())
    index.load(columns)
    assert len(gc.get_objects()) - before < 100
    assert [match.key for match in index.find("\n".join(texts))] == [key for key, _ in pairs]


def test_the_stripped_text_is_what_counts() -> None:
    text = "\n  The old harbour of Marsala never closes.\t\r\n"
    assert text_entry(text) == text_entry(text.strip())
    prompt = f"Context:\n{text}\nQuestion?"
    start = prompt.index("The")
    assert index_of(text).find(prompt) == [Match(start, start + len(text.strip()), key_of(text))]


@pytest.mark.parametrize("text", ["", "   \n", "1234567", "  1234567  "])
def test_texts_shorter_than_8_characters_are_never_matched(text: str) -> None:
    assert text_entry(text) is None


@pytest.mark.parametrize("length", [8, 9, 31, 32, 33, 64])
def test_each_length_around_the_anchors_is_found_at_both_ends_of_the_prompt(length: int) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(length))
    index = index_of(text)
    assert index.find(text) == [Match(0, length, key_of(text))]
    assert index.find("x" + text) == [Match(1, length + 1, key_of(text))]
    assert index.find(text + "x" + text[:-1]) == [Match(0, length, key_of(text))]


def test_offsets_count_characters_not_bytes() -> None:
    text = "naïve 😀 résumé, in full"
    assert index_of(text).find(f"😀😀 {text} 😀") == [Match(3, 3 + len(text), key_of(text))]


def test_line_ends_are_not_normalised() -> None:
    index = index_of("one line\r\nand another line")
    assert len(index.find("> one line\r\nand another line <")) == 1
    assert index.find("> one line\nand another line <") == []


def test_same_text_again_is_one_text_and_its_last_key_wins() -> None:
    entry = text_entry("the same text, registered twice")
    assert entry is not None
    index = ChunkIndex()
    index.add("a" * 64, entry)
    index.add("a" * 64, entry)
    assert len(index) == 1
    index.add("b" * 64, entry)
    assert len(index) == 1
    index.remove("a" * 64)  # no longer its key
    assert [match.key for match in index.find("the same text, registered twice")] == ["b" * 64]
    index.remove("b" * 64)
    index.remove("b" * 64)
    assert index.find("the same text, registered twice") == []


def test_one_key_may_have_two_texts() -> None:
    """A tokenizer that normalises gives two spellings the same ids; both are found, and both go with the key."""
    texts = ["A Text In Capitals", "a text in capitals"]
    index = ChunkIndex()
    for text in texts:
        entry = text_entry(text)
        assert entry is not None
        index.add("c" * 64, entry)
    assert len(index.find(" and ".join(texts))) == 2
    index.remove("c" * 64)
    assert len(index) == 0


def test_a_candidate_start_costs_one_digest_per_distinct_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 texts of 50 lengths begin alike: the places where they may start must not cost 2,000 digests each."""
    head = "Title: the same header on every page. "
    texts = [head + str(i).rjust(4, "0") + "x" * (i % 50) for i in range(2000)]
    index = index_of(*texts)
    searches = []
    real = module._Search

    def spy(*args: object) -> object:
        searches.append(real(*args))  # type: ignore[arg-type]
        return searches[-1]

    monkeypatch.setattr(module, "_Search", spy)
    assert len(index.find("\n\n".join(texts[::100]))) == 20
    assert searches[0].cost <= 20 * (50 * module._DIGEST_COST + 100)


def test_a_prompt_made_to_be_slow_is_given_up_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_MAX_COST", 100 * module._DIGEST_COST)
    index = index_of("found before that", *("a" * (40 + i) + "b" for i in range(50)))
    with caplog.at_level(logging.WARNING):
        matches = index.find("found before that" + "a" * 5000)
    assert [match.key for match in matches] == [key_of("found before that")]
    assert "gave up" in caplog.text


class Guarded(dict[bytes, str]):
    """A table that may only be touched under the lock; threads alone show a missing one too rarely."""

    def __init__(self, index: ChunkIndex) -> None:
        super().__init__(index._texts)
        self.lock = index._lock
        self.touched = 0

    def check(self) -> None:
        assert self.lock.locked()
        self.touched += 1

    def get(self, *args: Any) -> Any:
        self.check()
        return super().get(*args)

    def pop(self, *args: Any) -> Any:
        self.check()
        return super().pop(*args)

    def __setitem__(self, *args: Any) -> None:
        self.check()
        super().__setitem__(*args)


def test_tables_are_touched_under_the_lock_only() -> None:
    index = index_of("a text that is there from the start")
    index._texts = Guarded(index)
    entry = text_entry("another text, added later on")
    assert entry is not None
    index.add("a" * 64, entry)
    assert len(index.find("a text that is there from the start")) == 1
    index.remove("a" * 64)
    assert index._texts.touched == 4  # looked up and added, found, removed
    assert not index._lock.locked()


def test_threads_may_add_remove_and_find_at_once() -> None:
    head = "the beginning that all texts have in common: "
    texts = [f"{head}{i:03}" for i in range(40)]
    kept = f"{head}this one stays all the time, whatever happens"
    index = index_of(kept)
    prompt = "\n".join([kept, *texts])
    errors: list[BaseException] = []

    def churn(part: list[str]) -> None:
        try:
            for _ in range(20):
                for text in part:
                    entry = text_entry(text)
                    assert entry is not None
                    index.add(key_of(text), entry)
                assert index.find(prompt)[0].key == key_of(kept)
                for text in part:
                    index.remove(key_of(text))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=churn, args=(texts[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [match.key for match in index.find(prompt)] == [key_of(kept)]
    index.remove(key_of(kept))
    assert not any(index._anchors.values())
