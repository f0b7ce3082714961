"""A collection's own chunks as a quality task: a sample of it, and questions that need no model to be made.

Fidelity is measured against full prefill's own answer, so a question needs no right answer: it must only make the model
read the chunks. Half of the questions need one chunk, half of them two: questions of one hop hide what reuse loses.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.tasks.corpus import Corpus, Embed
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.own_data import QUESTION_TEMPLATE, SEPARATOR

COLLECTION_TASK = "collection"
SAMPLE_CHUNKS = 48
"""Chunks that are measured with, at most: every encoding's caches of them are in memory at once."""

STRETCH = 16
"""Chunks that are taken from a document in a row."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_WORD = re.compile(r"[^\W\d_][\w'-]*")
_MOST_SHARED = 4  # a word of more chunks than this ties nothing together


def sample_corpus(documents: Sequence[Sequence[str]], *, seed: int = 1, most: int = SAMPLE_CHUNKS) -> Corpus:
    """Draw stretches of documents, until there are `most` chunks.

    Args:
        documents: The collection's chunks, in order.
        seed: Draws other ones.
        most: Number of chunks.

    Raises:
        InputError: If there are fewer than two chunks.
    """
    draw = random.Random(seed)
    stretches = [
        [chunk.strip() for chunk in document[start : start + STRETCH] if chunk.strip()]
        for document in documents
        for start in range(0, len(document), STRETCH)
    ]
    draw.shuffle(stretches)
    taken: list[tuple[str, ...]] = []
    left = most
    for stretch in stretches:
        if left and stretch:
            taken.append(tuple(stretch[:left]))
            left -= len(taken[-1])
    corpus = Corpus(tuple(taken), is_kept=True)
    if len(corpus.chunks) < 2:
        msg = f"the collection has {len(corpus.chunks)} chunks; there must be two at least to measure anything"
        raise InputError(msg)
    return corpus


def make_questions(chunks: Sequence[str], count: int, *, seed: int = 1) -> list[str]:
    """Make questions from chunks: about one sentence of one, and about what two chunks say of the same thing.

    Deterministic, and without a model. Where there are too few sentences (code, tables, other scripts) the rest asks
    for what follows a chunk's beginning, so there is at least one question a chunk.
    """
    draw = random.Random(seed)
    words = [Counter(_WORD.findall(chunk)) for chunk in chunks]
    spread = Counter(word for found in words for word in found)
    one_hop = [_completion(sentence) for chunk in chunks for sentence in _sentences(chunk)]
    two_hops = [question for pair in _pairs(words, spread) if (question := _comparison(*pair, words, spread))]
    draw.shuffle(one_hop)
    draw.shuffle(two_hops)
    both = [one for pair in zip_longest(two_hops, one_hop) for one in pair if one is not None]
    openings = [f'What follows in the passage that begins with "{" ".join(chunk.split())[:40]}"?' for chunk in chunks]
    return list(dict.fromkeys([*both, *openings]))[:count]


def read_plain_questions(path: Path, limit: int) -> list[str]:
    """Read questions from a file: one a line, or JSON lines with a field `question`.

    Raises:
        InputError: If the file cannot be read, a line of JSON has no `question`, or there is none.
    """
    found: list[str] = []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for line in lines[:limit]:
            found.append(str(json.loads(line)["question"]) if line.startswith("{") else line)
    except (OSError, ValueError, KeyError) as error:
        reason = "a line has no field 'question'" if isinstance(error, KeyError) else error
        msg = f"{path} cannot be read as questions ({reason}); give one question a line, or JSON lines with 'question'"
        raise InputError(msg) from error
    if not found:
        msg = f"{path} holds no questions; give one a line"
        raise InputError(msg)
    return found


def collection_examples(
    corpus: Corpus, questions: Sequence[str], embed: Embed, *, top_k: int, answer_tokens: int
) -> list[TaskExample]:
    """Ask each question with its nearest `top_k` chunks, nearest first, in LlamaIndex's default prompt.

    Args:
        corpus: What is searched.
        questions: What is asked.
        embed: What finds chunks.
        top_k: Number of chunks in a prompt.
        answer_tokens: Longest answer.
    """
    import numpy as np

    chunks = corpus.chunks
    found = np.asarray(embed(list(questions))) @ np.asarray(embed(chunks)).T
    order = np.argsort(-found, axis=1, kind="stable")[:, :top_k]
    before, _, after = QUESTION_TEMPLATE.partition("{context}")
    return [
        TaskExample(
            task=COLLECTION_TASK,
            example_id=str(number),
            before=before,
            context=tuple(chunks[one] for one in row),
            after=after.format(question=question),
            query=question,
            answer_prefix="",
            references=("",),  # nobody knows the right answer; the scores say nothing
            metric="qa_f1",
            max_new_tokens=answer_tokens,
            is_document=False,
            glue=SEPARATOR,
        )
        for number, (question, row) in enumerate(zip(questions, order.tolist(), strict=True))
    ]


def _sentences(chunk: str) -> list[str]:
    found = (" ".join(sentence.split()) for sentence in _SENTENCE.split(chunk))
    return [one for one in found if 10 <= len(one.split()) <= 40]


def _completion(sentence: str) -> str:
    words = sentence.split()
    return f'Which words complete this sentence of the context: "{" ".join(words[: 2 * len(words) // 3])} ..."?'


def _pairs(words: Sequence[Counter[str]], spread: Counter[str]) -> list[tuple[str, int, int]]:
    """A word and two chunks that hold it, for words that few chunks do."""
    holders: dict[str, list[int]] = {}
    for number, found in enumerate(words):
        for word in found:
            if len(word) > 4 and 1 < spread[word] <= _MOST_SHARED:
                holders.setdefault(word, []).append(number)
    by_pair: dict[tuple[int, int], str] = {}
    for word in sorted(holders, key=lambda word: (word.islower(), -len(word), word)):  # names first
        by_pair.setdefault((holders[word][0], holders[word][-1]), word)
    return [(word, *pair) for pair, word in by_pair.items()]


def _comparison(word: str, first: int, second: int, words: Sequence[Counter[str]], spread: Counter[str]) -> str | None:
    def own(number: int) -> str | None:
        only = [one for one in words[number] if spread[one] == 1 and len(one) > 4]
        return max(only, key=lambda one: (not one.islower(), len(one), one), default=None)

    about = own(first), own(second)
    if None in about:
        return None
    one, other = about
    return f'What does the context say of "{word}" where it speaks of "{one}", and what where it speaks of "{other}"?'
