"""Chunks found in token ids, also where their ends grew together with what stands beside them."""

from __future__ import annotations

import random

from prophetkv_rag.prompt.token_index import EDGE, SHORTEST, TokenIndex, TokenMatch


def chunk_of(seed, length=60):
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(length)]


def index_of(*chunks):
    index = TokenIndex()
    for number, chunk in enumerate(chunks):
        index.add(str(number), chunk)
    return index


def test_whole_chunks_in_any_order():
    first, second = chunk_of(1), chunk_of(2, 33)
    index = index_of(first, second)
    prompt = [7, 8, *second, 9, *first, *second, 5]
    assert index.find(prompt) == [
        TokenMatch("1", 2, 35, 0),
        TokenMatch("0", 36, 96, 0),
        TokenMatch("1", 96, 129, 0),
    ]


def test_ends_that_differ_by_up_to_four_tokens():
    for trial in range(200):
        draw = random.Random(trial)
        chunk = chunk_of(trial + 10, draw.randrange(SHORTEST, 90))
        lost = draw.randrange(EDGE + 1), draw.randrange(EDGE + 1)
        inner = chunk[lost[0] : len(chunk) - lost[1]]
        prompt = [*[2001] * draw.randrange(1, 4), *inner, *[2002] * draw.randrange(1, 4)]
        start = prompt.index(inner[0])
        assert index_of(chunk).find(prompt) == [TokenMatch("0", start, start + len(inner), lost[0])]


def test_more_than_that_is_another_text():
    chunk = chunk_of(3)
    index = index_of(chunk)
    assert index.find([2001, *chunk[EDGE + 1 :]]) == []
    assert index.find([*chunk[: -EDGE - 1], 2001]) == []
    assert index.find([*chunk[:30], 2001, *chunk[31:]]) == []


def test_the_longest_of_those_that_begin_alike():
    chunk = chunk_of(4)
    index = index_of(chunk[:30], chunk)
    assert index.find([1, *chunk, 1]) == [TokenMatch("1", 1, 61, 0)]
    assert index.find([1, *chunk[:30], 1]) == [TokenMatch("0", 1, 31, 0)]


def test_short_chunks_and_forgotten_ones_are_not_found():
    chunk = chunk_of(5)
    index = index_of(chunk, chunk_of(6, SHORTEST - 1))
    assert ("0" in index, "1" in index, len(index)) == (True, False, 1)
    index.remove("0")
    index.remove("0")
    assert index.find(chunk) == []
    assert TokenIndex().find(chunk) == []


def test_a_prompt_made_to_be_searched_long_is_given_up_on():
    alike = [5] * 20_000
    assert index_of([*alike, *chunk_of(7)]).find(alike) == []


def test_matches_do_not_overlap():
    chunk = chunk_of(8)
    overlapping = [*chunk[20:], *chunk_of(9, 40)]
    found = index_of(chunk, overlapping).find([*chunk, *overlapping[40:], *chunk])
    assert [(match.key, match.start, match.stop) for match in found] == [("0", 0, 60), ("0", 100, 160)]
