"""Arms whose chunks are encoded behind other chunks: against engines that were told so by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.config import Encoding
from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.quality.engines import PAPER, Engines
from prophetkv_rag.evaluation.quality.fidelity import Arm, compare, full_prefill
from prophetkv_rag.evaluation.quality.grid import measure_example
from prophetkv_rag.evaluation.tasks.corpus import Corpus, corpora_of
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.prompting import task_prompt
from prophetkv_rag.evaluation.tasks.surroundings import Surroundings
from prophetkv_rag.profile import parse_behind
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

CHUNKS = [text_of(40, seed=seed).strip() for seed in range(5)]


def embed(texts):
    """Letters counted: deterministic, and no two of these texts are equally near a third."""
    counts = np.array([[text.count(chr(97 + letter)) for letter in range(26)] for text in texts], float)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def example(**changes):
    made = TaskExample(
        task="toy",
        example_id="0",
        before="Read this.\n",
        context=tuple(CHUNKS),
        after="What is it about?",
        query="What is it about?",
        answer_prefix="",
        references=("a",),
        metric="string_match_all",
        max_new_tokens=6,
        glue="\n",
    )
    return replace(made, **changes)


def engines_of(*examples, **corpora):
    default = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=PAPER)
    found = corpora_of(examples, default.tokenizer, 64) | corpora
    return Engines(default, {"toy": Surroundings(text_of(30, seed=7), "Read this.\n")}, found, embed=embed)


def by_hand(engines, encoding, behind, **config):
    engine = ProphetKVEngine(
        engines.default.model, engines.default.tokenizer, config=ProphetKVConfig(encoding=encoding, **config)
    )
    if encoding.startswith("neighbours"):
        engine.add_chunks(CHUNKS)
    engine.add_chunks(CHUNKS, behind=behind)
    prompt = task_prompt(example(), engine.tokenizer, 64)
    truth = full_prefill(engines.default, prompt, answer_tokens=6)
    return compare(engines.default, truth, engine.prefill(prompt, strategy="full_reuse"), score_tokens=1).kl


def measured(engines, *strategies):
    rows = measure_example(engines, example(), [Arm(one, 0.0) for one in strategies], chunk_tokens=64, answer_tokens=6)
    return [row.kl for row in rows[1:]]


def test_previous_chunks_of_a_context():
    engines = engines_of(example())
    behind = [CHUNKS[max(0, number - 2) : number] for number in range(5)]
    plain, previous = measured(engines, "full_reuse", "full_reuse@previous:2")
    assert previous == pytest.approx(by_hand(engines, "previous:2", behind), abs=1e-7)
    assert abs(previous - plain) > 1e-6
    opening = "Read this.\n{context}"
    (behind_both,) = measured(engines, "full_reuse@prompt+previous:1")
    assert behind_both == pytest.approx(
        by_hand(engines, "previous:1", [one[-1:] for one in behind], prompt_template=opening), abs=1e-7
    )


def test_neighbours_of_a_task():
    engines = engines_of(example())
    likeness = embed(CHUNKS) @ embed(CHUNKS).T
    behind = [
        [
            CHUNKS[one]
            for one in sorted((one for one in range(5) if one != number), key=lambda one: likeness[number, one])
        ]
        for number in range(5)
    ]
    (found,) = measured(engines, "full_reuse@neighbours:2")
    assert found == pytest.approx(by_hand(engines, "neighbours:2", [row[-2:] for row in behind]), abs=1e-7)
    (turned,) = [by_hand(engines, "neighbours:2", [row[-2:][::-1] for row in behind])]
    assert abs(found - turned) > 1e-7  # the nearest stands last, and that can be told


def test_a_question_file_has_no_previous_chunks():
    engines = engines_of(example(is_document=False))
    alone, previous = measured(engines, "full_reuse", "full_reuse@previous:2")
    assert previous == pytest.approx(alone, abs=1e-9)


def test_of_both_kinds_a_document_has_the_one_and_a_question_file_the_other():
    document, questions = engines_of(example()), engines_of(example(is_document=False))
    for engines, same in ((document, "previous:2"), (questions, "neighbours:2")):
        one, both = measured(engines, f"full_reuse@{same}", "full_reuse@previous:2+neighbours:2")
        assert both == pytest.approx(one, abs=1e-7)
    assert abs(measured(document, "full_reuse@neighbours:2")[0] - measured(document, "full_reuse@previous:2")[0]) > 1e-7


def test_kept_caches_are_computed_once():
    engines = engines_of(toy=Corpus((tuple(CHUNKS),), is_kept=True))
    arm = Arm("full_reuse@previous:2", 0.0)
    first = measured(engines, arm.strategy)
    engine = engines.of(arm, "toy")
    assert len(engine.chunk_index) == 5  # still there, the example gone
    assert engine.store.stats().chunks == 5
    assert measured(engines, arm.strategy) == first


def test_what_a_chunk_stands_behind_is_part_of_the_inputs():
    prompt = task_prompt(example(), tiny_tokenizer(), 64)
    arm = Arm("full_reuse@previous:1", 0.0)
    forth = engines_of(toy=Corpus((tuple(CHUNKS),))).inputs_of(arm, "toy", prompt)
    back = engines_of(toy=Corpus((tuple(CHUNKS[::-1]),))).inputs_of(arm, "toy", prompt)
    assert forth != back
    assert forth == engines_of(example()).inputs_of(arm, "toy", prompt)


def test_the_chain_before_a_chunk_is_encoded_too():
    corpus = Corpus((("a", "b", "c", "d"), ("e",)))
    assert corpus.behind([" c\n", "e"], Encoding("previous", 1), embed) == {"a": [], "b": ["a"], "c": ["b"], "e": []}
    assert corpus.behind(["unknown"], Encoding("previous", 2), embed) == {"unknown": []}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (False, False, "plain")),
        ("prompt", (True, False, "plain")),
        ("prompt+corpus+previous:3", (True, True, "previous:3")),
        ("neighbours", (False, False, "neighbours:3")),
        ("prompt+previous+neighbours:2", (True, False, "previous:2+neighbours:2")),
    ],
)
def test_what_stands_behind_the_at(text, expected):
    has_opening, has_lead_in, encoding = parse_behind(text)
    assert (has_opening, has_lead_in, str(encoding)) == expected


@pytest.mark.parametrize(
    "text",
    ["corpus+prompt", "prompt+prompt", "previous:2+prompt", "neighbours:2+previous:1", "plain", "previous:0", "x"],
)
def test_what_does_not(text):
    with pytest.raises(InputError, match=r"unknown encoding .*; allowed: prompt, corpus, and previous:N"):
        parse_behind(text)
    with pytest.raises(InputError, match=r"strategy 'prophetkv@"):
        Arm(f"prophetkv@{text}", 0.1).check()
