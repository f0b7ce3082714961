"""RULER's tasks against their definitions: every answer is worked out again from the prompt's own text.

Tokens are words between blanks here; the sizes are compared with a search that simply tries one size after the other.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.loading import check_sources
from prophetkv_rag.evaluation.tasks.ruler import RULER_TASKS, Sources, generate
from prophetkv_rag.evaluation.tasks.ruler.fitting import largest_size, reduced_size
from prophetkv_rag.evaluation.tasks.ruler.haystack import NOISE_LINE, essay_words, insert_units, split_sentences
from prophetkv_rag.evaluation.tasks.ruler.settings import TaskSettings
from prophetkv_rag.evaluation.tasks.ruler.words import word_lists

NIAH = [name for name in RULER_TASKS if "niah" in name]
NEW_TOKENS = dict.fromkeys(NIAH, 128) | {
    "ruler_vt": 30,
    "ruler_cwe": 120,
    "ruler_fwe": 50,
    "ruler_qa_1": 32,
    "ruler_qa_2": 32,
}
ANSWERS = {
    "ruler_niah_multivalue": 4,
    "ruler_niah_multiquery": 4,
    "ruler_vt": 5,
    "ruler_cwe": 10,
    "ruler_fwe": 3,
    "ruler_qa_1": 2,
}
LENGTH = 1100

# Two rows of RULER's own script (NVIDIA/RULER, Apache-2.0; niah_multikey_3, seed 42), cut to three lines of context.
OFFICIAL_ROWS = (
    "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the uuid afterwards.\n"
    "One of the special magic uuids for 1e9b23bc-50c7-4006-b14d-3441b8a6171f is: "
    "c31edbbc-f36c-462b-892e-6161be2d740a.\n"
    "One of the special magic uuids for 455ac762-7428-4656-b3ee-4d3b5a104129 is: "
    "1ee34dc4-3b04-4a8b-805b-fdc94e7ed827.\n"
    "One of the special magic uuids for b489d070-7914-48a8-bea4-ff31517400f8 is: "
    "62d60e93-6198-4d54-8fb8-7e6fe9d68f23.\n"
    "What is the special magic uuid for 455ac762-7428-4656-b3ee-4d3b5a104129 mentioned in the provided "
    "text? The special magic uuid for 455ac762-7428-4656-b3ee-4d3b5a104129 mentioned in the provided text is",
    "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the uuid afterwards.\n"
    "One of the special magic uuids for d85480f0-dfca-40b7-99b1-7e80dea4ae17 is: "
    "e912b4bf-86a4-4ae4-9986-b4b270b7e868.\n"
    "One of the special magic uuids for 2051acef-097a-4e10-b6fe-bc0e7ecddbaf is: "
    "54fd9ad3-9716-408e-b721-69bb80962718.\n"
    "One of the special magic uuids for 46fb7bf3-00b9-44a3-9892-40ace68933a9 is: "
    "fcce96f6-250a-4578-bbe9-4499dbc080fd.\n"
    "What is the special magic uuid for 2051acef-097a-4e10-b6fe-bc0e7ecddbaf mentioned in the provided "
    "text? The special magic uuid for 2051acef-097a-4e10-b6fe-bc0e7ecddbaf mentioned in the provided text is",
)
OFFICIAL_ANSWERS = ("1ee34dc4-3b04-4a8b-805b-fdc94e7ed827", "54fd9ad3-9716-408e-b721-69bb80962718")
UUID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def text_of(example: TaskExample) -> str:
    return example.before + "".join(example.context) + example.after + example.answer_prefix


def count_words(example: TaskExample) -> int:
    return len(text_of(example).split())


def total(example: TaskExample) -> int:
    return count_words(example) + example.max_new_tokens


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Files of both formats whose documents are of very different lengths; each answer is in one document alone."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "squad.json.gz").write_bytes(gzip.compress(json.dumps(squad()).encode()))
    (folder / "hotpot.json").write_text(json.dumps(hotpot()), "utf-8")
    return Sources(squad_path=folder / "squad.json.gz", hotpot_path=folder / "hotpot.json")


def squad() -> dict[str, Any]:
    articles = []
    for a in range(6):
        paragraphs = []
        for p in range(4):
            answer = f"answer-{a}-{p}"
            asked = {"question": f"What is in {a} {p}?", "answers": [{"text": answer}, {"text": answer.upper()}] * 2}
            lost = {"question": "Nobody knows?", "answers": [], "is_impossible": True}
            text = f"Paragraph {a} {p} has {answer} and {answer.upper()}." + " Filler." * (3 + (7 * a + 5 * p) % 17)
            paragraphs.append({"context": text, "qas": [lost, {**asked, "is_impossible": False}]})
        articles.append({"title": f"Article {a}", "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def hotpot() -> list[dict[str, Any]]:
    return [
        {
            "_id": f"id-{row}",
            "question": f"Which one is {row}?",
            "answer": f"answer-{row}",
            "context": [
                [
                    f"Title {row} {n}",
                    [f"This is document {row} {n}.", f" It has answer-{row}." if n == 3 else " x" * row],
                ]
                for n in range(10)
            ],
        }
        for row in range(7)
    ]


def make(task: str, sources: Sources, number: int = 4, **changes: Any) -> list[TaskExample]:
    settings = {"max_seq_length": LENGTH, "seed": 42, "count_tokens": count_words, "sources": sources, **changes}
    return list(generate(task, num_samples=number, **settings))


def test_what_a_task_is_made_of_is_checked_without_a_tokenizer(sources: Sources) -> None:
    """With a count of nothing, `ruler_vt` once grew its worked example until the memory was full."""
    check_sources(list(RULER_TASKS), length=LENGTH, seed=42, sources=sources)


# The official format


def parse_official(text: str) -> tuple[str, str]:
    """Return the key asked for and its value; fails on any other format."""
    match = re.fullmatch(
        r"A special magic uuid is hidden within the following text\. Make sure to memorize it\. I will quiz you about "
        rf"the uuid afterwards\.\n((?:One of the special magic uuids for {UUID} is: {UUID}\.\n)+)What is the special "
        rf"magic uuid for ({UUID}) mentioned in the provided text\? The special magic uuid for \2 mentioned in the "
        r"provided text is",
        text,
    )
    assert match is not None
    pairs = re.findall(rf"for ({UUID}) is: ({UUID})", match[1])
    [value] = [value for key, value in pairs if key == match[2]]
    return match[2], value


def test_the_official_rows_and_ours_have_one_format(sources: Sources) -> None:
    assert tuple(parse_official(text)[1] for text in OFFICIAL_ROWS) == OFFICIAL_ANSWERS
    rows = make("ruler_niah_multikey_3", sources)
    assert [parse_official(text_of(row))[1] for row in rows] == [row.references[0] for row in rows]
    fixed = [
        [re.sub(UUID, "UUID", line) for line in text.split("\n")] for text in (*OFFICIAL_ROWS, *map(text_of, rows))
    ]
    assert len({(lines[0], *set(lines[1:-1]), lines[-1]) for lines in fixed}) == 1


EXPECTED_TEXT = {
    "ruler_niah_single_2": (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n",
        "\nWhat is the special magic number for KEY mentioned in the provided text?",
        " The special magic number for KEY mentioned in the provided text is",
    ),
    "ruler_niah_multikey_1": (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n",
        "\nWhat is the special magic number for KEY mentioned in the provided text?",
        " The special magic number for KEY mentioned in the provided text is",
    ),
    "ruler_niah_multivalue": (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n",
        "\nWhat are all the special magic numbers for KEY mentioned in the provided text?",
        " The special magic numbers for KEY mentioned in the provided text are",
    ),
    "ruler_niah_multiquery": (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n",
        "\nWhat are all the special magic numbers for KEY, KEY, KEY, and KEY mentioned in the provided text?",
        " The special magic numbers for KEY, KEY, KEY, and KEY mentioned in the provided text are",
    ),
    "ruler_fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. ",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    "ruler_qa_1": (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nThe following are given documents.\n\n",
        "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other "
        "words.\n\nQuestion: What is in 0 0?",
        " Answer:",
    ),
}


@pytest.mark.parametrize("task", EXPECTED_TEXT)
def test_templates_word_for_word(task: str, sources: Sources) -> None:
    """One value asked for is a singular in question and prefix; the needles keep their plural."""
    [example] = make(task, sources, 1)
    before, after, prefix = EXPECTED_TEXT[task]
    keys = set(re.findall(r"special magic \w+ for (.*?) is: ", "".join(example.context)))
    pattern = "|".join(sorted(map(re.escape, keys), key=len, reverse=True)) or "$^"
    assert example.before == before
    assert re.sub(pattern, "KEY", example.after) == after
    assert re.sub(pattern, "KEY", example.answer_prefix) == prefix


def test_vt_and_cwe_ask_word_for_word(sources: Sources) -> None:
    """What stands before the context is read apart with the answers."""
    [vt], [cwe] = make("ruler_vt", sources, 1), make("ruler_cwe", sources, 1)
    assert re.sub(r"\d{5}", "NUMBER", vt.after + vt.answer_prefix) == (
        "\nQuestion: Find all variables that are assigned the value NUMBER in the text above. Answer: According to the "
        "chain(s) of variable assignment in the text above, 5 variables are assigned the value NUMBER, they are: "
    )
    assert cwe.before.startswith(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n1. "
    )
    assert cwe.after + cwe.answer_prefix == (
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most "
        "often in the list are:"
    )


# The length rule


def best_sizes(task: str, sources: Sources, length: int, number: int) -> tuple[Any, list[int]]:
    """Largest size of each sample, one size after the other."""
    builder = RULER_TASKS[task](TaskSettings(task, length, 42, count_words, sources))
    sizes = []
    for index in range(number):
        best = builder.min_size - 1
        for size in count(builder.min_size):
            if builder.max_size is not None and size > builder.max_size:
                break
            if total(builder.build(index, size)) > length:
                break
            best = size
        sizes.append(best)
    return builder, sizes


@pytest.mark.parametrize("task", RULER_TASKS)
def test_every_sample_is_as_long_as_fits(task: str, sources: Sources) -> None:
    examples = make(task, sources)
    builder, best = best_sizes(task, sources, LENGTH, len(examples))
    expected = [builder.build(index, min(size, best[0])) for index, size in enumerate(best)]
    assert [total(example) for example in examples] == [total(example) for example in expected]
    assert examples == expected
    assert max(map(total, examples)) <= LENGTH


def test_a_longer_sample_is_reduced(sources: Sources) -> None:
    """The questions' own paragraphs differ in length, so one size cannot do for all."""
    sizes = [len(example.context) for example in make("ruler_qa_1", sources, 24, max_seq_length=330)]
    assert len(set(sizes)) > 1
    assert max(sizes) == sizes[0]


@pytest.mark.parametrize(("task", "unit"), [("ruler_niah_single_1", 18), ("ruler_niah_single_2", 1), ("ruler_vt", 18)])
def test_less_than_one_unit_is_left(task: str, unit: int, sources: Sources) -> None:
    assert all(0 <= LENGTH - total(example) < unit for example in make(task, sources))


@pytest.mark.parametrize("limit", [5, 6, 7, 11, 12, 40, 41, 1000])
def test_searches_agree_with_trying_every_size(limit: int) -> None:
    def fits(size: int) -> bool:
        return size <= limit

    assert largest_size(fits, 5) == limit
    for end in range(5, 60):
        assert largest_size(fits, 5, end) == min(limit, end)
        assert reduced_size(fits, 5, end) == min(limit, end)
    assert reduced_size(lambda size: False, 5, limit) is None


def test_cwe_ends_with_the_words(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(word_lists(), all=word_lists().all[:50])
    monkeypatch.setattr("prophetkv_rag.evaluation.tasks.ruler.word_counts.word_lists", lambda: few)
    [example] = make("ruler_cwe", sources, 1)
    assert len("".join(example.context).split()) == 2 * (10 * 6 + 40 * 1)


# The answers


def is_adjective_noun(key: str) -> bool:
    cuts = [match.start() for match in re.finditer("-", key)]
    words = word_lists()
    return any(key[:cut] in words.adjectives and key[cut + 1 :] in words.nouns for cut in cuts)


def check_niah(example: TaskExample) -> None:
    context = "".join(example.context)
    kind = "numbers" if re.fullmatch(r"\d{7}", example.references[0]) else "uuids"
    needles = re.findall(rf"(?<!\S)One of the special magic {kind} for (.+?) is: (\S+)\.(?!\S)", context)
    form = r"\d{7}" if kind == "numbers" else UUID
    assert all(re.fullmatch(form, value) for _, value in needles)
    assert example.query is not None
    asked = re.search(r" for (.+) mentioned in the provided text\?$", example.query)
    assert asked is not None
    assert f" for {asked[1]} mentioned" in example.answer_prefix
    found = [value for key in re.split(r", and |, ", asked[1]) for k, value in needles if k == key]
    assert sorted(found) == sorted(example.references)
    keys, values = {key for key, _ in needles}, [value for _, value in needles]
    assert len(set(values)) == len(values)
    hidden = {"multikey_1": (4, 4), "multivalue": (1, 4), "multiquery": (4, 4)}
    short = example.task.removeprefix("ruler_niah_")
    if short in ("multikey_2", "multikey_3"):
        assert len(keys) == len(needles) == len(example.context) > 50
        assert all(re.fullmatch(UUID, key) if short == "multikey_3" else is_adjective_noun(key) for key in keys)
    else:
        assert (len(keys), len(needles)) == hidden.get(short, (1, 1))
    if short == "single_1":
        lines = context.split("\n")
        assert lines.count(NOISE_LINE) == len(lines) - 1
    if kind == "uuids":
        assert short in ("single_3", "multikey_3")


def resolve(text: str, value: str) -> list[str]:
    """Names that hold the value, by running the assignments in order."""
    held: dict[str, str] = {}
    for name, number, source in re.findall(r"^VAR ([A-Z]+) = (?:(\d{5})|VAR ([A-Z]+) )$", text, re.MULTILINE):
        assert name not in held
        held[name] = number or held[source]
    return [name for name, number in held.items() if number == value]


def check_vt(example: TaskExample) -> None:
    value = re.search(r"value (\d{5})", example.after)
    assert value is not None
    context = "".join(example.context)
    assert resolve(context, value[1]) == list(example.references)
    assert all(re.fullmatch("[A-Z]{5}", name) for name in example.references)
    assert context.count("VAR") == 9
    assert set(context.split("\n")) - set(re.findall(r"^VAR .*$", context, re.MULTILINE)) == {NOISE_LINE}
    shown, _, head = example.before.partition("\n\nMemorize")
    assert head == " and track the chain(s) of variable assignment hidden in the following text.\n\n"
    told, _, names = shown.partition("they are:  ")
    shown_value = re.search(r"assigned the value (\d{5}) in the text above\. Answer:", told)
    assert shown_value is not None
    assert f"5 variables are assigned the value {shown_value[1]}, " in told
    assert resolve(told, shown_value[1]) == names.split(" ")
    assert all(re.fullmatch("[A-Z]{3}", name) for name in names.split(" "))
    assert 500 - 18 < len(told.split()) <= 500


def check_cwe(example: TaskExample) -> None:
    match = re.fullmatch(r"(.*?\.)\n(.*)\nQuestion: (.*)\n(.*?\.)\n", example.before, re.DOTALL)
    assert match is not None
    assert match[1] == match[4]
    shown, answers = match[2], match[3].partition(example.answer_prefix)[2]
    short = int(example.example_id.partition("-")[0]) < 4096
    for text, names, repeats in (
        (shown, numbered_words(answers), (3, 1) if short else (10, 3)),
        ("".join(example.context), list(example.references), (6, 1) if short else (30, 3)),
    ):
        counts = Counter(numbered_words(text))
        assert {word for word, times in counts.items() if times == repeats[0]} == set(names)
        assert set(counts.values()) == set(repeats)
        assert len(names) == 10
    assert len(set(numbered_words(shown))) == (20 if short else 40)


def numbered_words(text: str) -> list[str]:
    """Words of `1. word 2. word ...`, whose numbers must be right."""
    parts = re.split(r"(?:^| )(\d+)\. ", text.strip())
    assert parts[1::2] == [str(number) for number in range(1, 1 + len(parts) // 2)]
    return parts[2::2]


def check_fwe(example: TaskExample) -> None:
    counts = Counter("".join(example.context).split(" "))
    noise = counts.pop("...")
    assert all(re.fullmatch("[a-z]{6}", word) for word in counts)
    ranked = counts.most_common(4)
    assert [word for word, _ in ranked[:3]] == list(example.references)
    times = [noise, *(number for _, number in ranked)]
    assert times == sorted(set(times), reverse=True)  # no ties
    # Rank k has a share of 1/k^2, up to the rounding of one occurrence.
    assert all(
        noise / (rank + 1) ** 2 - 1 <= number <= (noise + 1) / (rank + 1) ** 2 for rank, number in enumerate(times)
    )


def check_qa(example: TaskExample) -> None:
    documents = re.split(r"(?:^|\n\n)Document (\d+):\n", "".join(example.context))
    assert documents[1::2] == [str(number) for number in range(1, 1 + len(example.context))]
    texts = documents[2::2]
    assert len(texts) >= 10
    gold = [text for text in texts if all(answer in text for answer in example.references)]
    assert gold
    index = int(example.example_id.rpartition("-")[2])
    if example.task == "ruler_qa_1":
        article, paragraph = divmod(index, 4)
        assert example.query == f"What is in {article} {paragraph}?"
        assert example.references == (f"answer-{article}-{paragraph}", f"ANSWER-{article}-{paragraph}")
        own = {entry["context"] for entry in squad()["data"][article]["paragraphs"]}
    else:
        row = hotpot()[index]
        assert (example.query, example.references) == (row["question"], (row["answer"],))
        own = {f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]}
    assert own <= set(texts)


CHECKS: dict[str, Callable[[TaskExample], None]] = {
    **dict.fromkeys(NIAH, check_niah),
    "ruler_vt": check_vt,
    "ruler_cwe": check_cwe,
    "ruler_fwe": check_fwe,
    "ruler_qa_1": check_qa,
    "ruler_qa_2": check_qa,
}


@pytest.mark.parametrize("length", [LENGTH, 4096])
@pytest.mark.parametrize("task", RULER_TASKS)
def test_the_answers_follow_from_the_prompt(task: str, length: int, sources: Sources) -> None:
    examples = make(task, sources, max_seq_length=length)
    assert len({example.example_id for example in examples}) == len(examples)
    for example in examples:
        CHECKS[task](example)
        assert (example.task, example.max_new_tokens, example.chat) == (task, NEW_TOKENS[task], True)
        assert example.metric == ("string_match_part" if "qa" in task else "string_match_all")
        assert len(example.references) == ANSWERS.get(task, 1)
        assert example.query is not None
        assert example.query in example.after


@pytest.mark.parametrize("task", RULER_TASKS)
def test_pieces_are_units_with_their_separators(task: str, sources: Sources) -> None:
    context = make(task, sources, 1)[0].context
    kind = RULER_TASKS[task](TaskSettings(task, LENGTH, 42, count_words, sources))
    if "qa" in task:
        assert all(re.fullmatch(r"Document \d+:\n.*\n\n", piece, re.DOTALL) for piece in context[:-1])
        assert not context[-1].endswith("\n")
    elif task in ("ruler_cwe", "ruler_fwe") or getattr(getattr(kind, "variant", None), "haystack", "") == "essay":
        assert all(re.fullmatch(r" \S.*\S", piece) for piece in context[1:])
        assert not context[0].startswith(" ")
        assert max(len(piece.split()) for piece in context) < 150
    else:
        assert all(re.fullmatch(r"[^\n]+\n", piece) for piece in context[:-1])
        assert "\n" not in context[-1]


def test_related_documents_come_before_others(sources: Sources) -> None:
    """SQuAD: the article's other paragraphs fill the prompt first; random ones follow when all of these are in."""
    builder = RULER_TASKS["ruler_qa_1"](TaskSettings("ruler_qa_1", LENGTH, 42, count_words, sources))
    for size, expected in ((1, 1), (3, 3), (4, 4), (9, 4), (24, 4), (30, 8)):
        context = builder.build(5, size).context
        assert len(context) == size
        assert sum("Paragraph 1 " in piece for piece in context) == expected
    assert len(set(re.findall(r"Paragraph \d \d", "".join(builder.build(5, 24).context)))) == 24


def test_the_order_of_documents_depends_on_the_seed_and_number_alone(sources: Sources) -> None:
    builder = RULER_TASKS["ruler_qa_2"](TaskSettings("ruler_qa_2", LENGTH, 42, count_words, sources))
    places = [
        [place for place, text in enumerate(builder.build(i, 15).context) if f"document {i} 3." in text]
        for i in range(5)
    ]
    assert len(set(map(tuple, places))) == 1


# Haystacks


def test_needles_keep_their_order_and_places() -> None:
    assert insert_units(["a", "b", "c"], [0, 2, 2, 3], ["1", "2", "3", "4"]) == ["1", "a", "b", "2", "3", "c", "4"]


def test_sentences_end_by_the_rule() -> None:
    text = 'Mr. Smith met J. Doe in the U.S. Senate. "Why?" he asked. He left! (Really.) Then. . . nothing 3.5 came'
    assert split_sentences(text.split()) == [
        "Mr. Smith met J. Doe in the U.S. Senate.",
        '"Why?" he asked.',
        "He left!",
        "(Really.)",
        "Then. . . nothing 3.5 came",
    ]


def test_essays_are_the_first_words_of_the_same_text(sources: Sources) -> None:
    needle = r"One of the special magic numbers for .+? is: \d{7}\. ?"
    examples = make("ruler_niah_multikey_1", sources)
    stripped = {re.sub(needle, "", "".join(example.context)).strip() for example in examples}
    essay = " ".join(essay_words(None))
    assert all(essay.startswith(text) for text in stripped)
    depths = {tuple(i for i, piece in enumerate(e.context) if "special magic" in piece) for e in examples}
    assert len(depths) == len(examples)


def test_a_given_essay_is_repeated_where_it_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "essay.txt").write_text("Alpha  beta.\nGamma\t delta. ", "utf-8")
    [example] = make("ruler_niah_single_2", Sources(essay_path=tmp_path / "essay.txt"), 1)
    text = re.sub(r"One of .+? is: \d{7}\. ?", "", "".join(example.context))
    assert re.fullmatch(r"(Alpha beta\. Gamma delta\. )+(Alpha( beta\.( Gamma( delta\.)?)?)?)?", text)
    assert total(example) == LENGTH


# Determinism


@pytest.mark.parametrize("task", RULER_TASKS)
def test_samples_depend_on_their_index_and_the_seed_alone(task: str, sources: Sources) -> None:
    examples = make(task, sources)
    assert make(task, sources, 2) == examples[:2]
    other = make(task, sources, seed=43)
    assert all(ours.context != theirs.context for ours, theirs in zip(examples, other, strict=True))
    assert len({example.context for example in examples}) == len(examples)


def test_other_processes_make_the_same_samples(sources: Sources) -> None:
    """Neither the hash seed nor the global generator plays a part; and no torch is needed."""
    code = (
        "import sys, random; random.seed(int(sys.argv[1]))\n"
        "from prophetkv_rag.evaluation.tasks.ruler import generate\n"
        "def tokens(e): return len((e.before + ''.join(e.context) + e.after + e.answer_prefix).split())\n"
        "for task in ('ruler_niah_multikey_2', 'ruler_vt', 'ruler_cwe', 'ruler_fwe'):\n"
        "    print([*generate(task, max_seq_length=1100, num_samples=2, count_tokens=tokens)])\n"
        "assert 'torch' not in sys.modules\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, seed],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert str(make("ruler_vt", sources, 2)) in runs[0].splitlines()


# What users do wrong


def test_an_unknown_task_is_told_the_names(sources: Sources) -> None:
    with pytest.raises(InputError, match=r"unknown RULER task 'vt'; there are: ruler_niah_single_1, .*ruler_qa_2"):
        make("vt", sources)


def test_there_are_thirteen_tasks() -> None:
    assert len(RULER_TASKS) == 13
    assert len(NIAH) == 8


@pytest.mark.parametrize("task", RULER_TASKS)
def test_a_length_too_small_names_the_smallest(task: str, sources: Sources) -> None:
    with pytest.raises(InputError, match=rf"{task}: max_seq_length is 60, .* give at least \d+$") as caught:
        make(task, sources, max_seq_length=60)
    needed = int(str(caught.value).rpartition(" ")[2])
    assert len(make(task, sources, max_seq_length=needed)) == 4
    with pytest.raises(InputError, match=f"give at least {needed}$"):
        make(task, sources, max_seq_length=needed - 1)


def test_more_samples_than_questions(sources: Sources) -> None:
    assert len(make("ruler_qa_2", sources, 7)) == 7
    with pytest.raises(InputError, match="num_samples is 8, but the file has only 7 questions"):
        make("ruler_qa_2", sources, 8)
    with pytest.raises(InputError, match="num_samples must be at least 1, not 0"):
        generate("ruler_vt", max_seq_length=LENGTH, num_samples=0, count_tokens=count_words)


@pytest.mark.parametrize(
    ("task", "message"),
    [("ruler_qa_1", "squad_path: SQuAD 2.0 dev"), ("ruler_qa_2", "hotpot_path: HotpotQA dev")],
)
def test_a_missing_source_names_the_option(task: str, message: str) -> None:
    with pytest.raises(InputError, match=f"{task} needs {message}"):
        make(task, Sources())


def test_without_wonderwords_the_extra_is_named(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    word_lists.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'prophetkv-rag\[bench\]'"):
        make("ruler_cwe", sources)
    assert make("ruler_niah_multikey_3", sources)  # has no words


def test_both_hotpot_formats_give_the_same_samples(sources: Sources, tmp_path: Path) -> None:
    rows = [
        {
            "question": row["question"],
            "answers": [row["answer"]],
            "passages": [{"title": title, "text": "".join(sentences)} for title, sentences in row["context"]],
        }
        for row in hotpot()
    ]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert make("ruler_qa_2", Sources(hotpot_path=path)) == make("ruler_qa_2", sources)


def without(data: Any, *path: str | int) -> Any:
    """The data with one entry removed."""
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return data


LINE = {"question": "?", "answers": ["a"], "passages": [{"title": "t", "text": "x"}]}


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("ruler_qa_1", "{", "squad.json: not JSON"),
        ("ruler_qa_1", [], "squad.json: the field 'data' is missing"),
        ("ruler_qa_1", without(squad(), "data", 2, "paragraphs"), "article 2: the field 'paragraphs' is missing"),
        ("ruler_qa_1", without(squad(), "data", 1, "paragraphs", 3, "context"), "article 1, paragraph 3: .*'context'"),
        (
            "ruler_qa_1",
            without(squad(), "data", 1, "paragraphs", 0, "qas", 1, "answers"),
            "squad.json, article 1, paragraph 0, question 1: the field 'answers' is missing",
        ),
        ("ruler_qa_2", without(hotpot(), 2, "answer"), "hotpot.json, row 2: the field 'answer' is missing"),
        ("ruler_qa_2", [{**hotpot()[0], "context": ["text"]}], "row 0: context 0 must be \\[title, \\[sentence"),
        ("ruler_qa_2", [{**hotpot()[0], "question": 3}], "row 0: the field 'question' must be a str, not int"),
        ("ruler_qa_2", f"{json.dumps(LINE)}\n\n{{", "hotpot.json, line 3: not JSON"),
        ("ruler_qa_2", json.dumps({**LINE, "answers": []}), "line 1: the field 'answers' must hold at least one text"),
        ("ruler_qa_2", json.dumps(without(LINE | {"passages": [{"title": "t"}]}, "answers")), "passage 0: .*'text'"),
    ],
)
def test_a_malformed_source_is_named_with_its_row(task: str, content: Any, message: str, tmp_path: Path) -> None:
    name = "squad" if task == "ruler_qa_1" else "hotpot"
    path = tmp_path / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    with pytest.raises(InputError, match=message):
        make(task, Sources(**{f"{name}_path": path}))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json.gz").write_bytes(gzip.compress(b"[" * 999)[:20])
    (tmp_path / "blank.txt").write_text(" \n", "utf-8")
    with pytest.raises(InputError, match=r"cannot read .*broken\.json\.gz"):
        make("ruler_qa_2", Sources(hotpot_path=tmp_path / "broken.json.gz"))
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.json"):
        make("ruler_qa_1", Sources(squad_path=tmp_path / "nowhere.json"))
    with pytest.raises(InputError, match=r"essay_path: .*blank\.txt holds no words"):
        make("ruler_niah_single_2", Sources(essay_path=tmp_path / "blank.txt"))
    with pytest.raises(InputError, match=r"essay_path: cannot read .*nowhere\.txt"):
        make("ruler_niah_single_2", Sources(essay_path=tmp_path / "nowhere.txt"))


def test_samples_are_made_one_by_one(sources: Sources) -> None:
    made: list[str] = []

    def counting(example: TaskExample) -> int:
        made.append(example.example_id)
        return count_words(example)

    samples = generate("ruler_vt", max_seq_length=LENGTH, num_samples=10**6, count_tokens=counting, sources=sources)
    assert len(list(islice(samples, 3))) == 3
    assert not any(example_id.endswith("-7") for example_id in made)
