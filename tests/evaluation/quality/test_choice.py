"""What is picked for a collection: measured on tiny models, and chosen from profiles made by hand."""

from __future__ import annotations

import re

import pytest

from prophetkv_rag import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.quality import calibrate, choice
from prophetkv_rag.evaluation.quality.choice import TooLittleTimeError, choose, default_strategies, measure_collection
from prophetkv_rag.evaluation.quality.results import FULL, QualityRow
from prophetkv_rag.evaluation.tasks.collection import make_questions, read_plain_questions, sample_corpus
from tests.evaluation.quality.test_encodings import embed
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

DOCUMENTS = [[text_of(40, seed=10 * document + number) for number in range(4)] for document in range(3)]


def row(number, strategy, ratio, agreement, kl=0.1, charged=None):
    return QualityRow(
        task="collection",
        example_id=str(number),
        strategy=strategy,
        recompute_ratio=ratio,
        charged_ratio=ratio if charged is None else charged,
        kl=kl,
        top1_agreement=agreement,
        attended_recall=None,
        score=0.0,
        prompt_tokens=10,
        chunk_tokens=5,
        recomputed_tokens=1,
        ttft_s=0.1,
        answer="",
    )


def chosen(*rows, wanted=0.9):
    full = [row(0, FULL, 1.0, 1.0, 0.0)]
    return choose(calibrate([*full, *rows], model="m", model_fingerprint="f", wanted_agreement=wanted))


def test_the_cheapest_that_keeps_what_is_wanted():
    found = chosen(
        row(0, "prophetkv@prompt+corpus", 0.05, 0.8),
        row(0, "prophetkv@prompt+corpus", 0.2, 0.95),
        row(0, "prophetkv@prompt+corpus+previous:2", 0.05, 0.92, kl=0.03),
        row(0, "prophetkv@prompt+corpus+previous:2", 0.2, 0.97),
    )
    assert (found.encoding, found.has_lead_in, found.recompute_ratio) == ("previous:2", True, 0.05)
    assert (found.strategy, found.kl, found.is_enough) == ("prophetkv", 0.03, True)
    assert str(found) == (
        "chunks behind a lead-in and previous:2, prophetkv at 5%: keeps 92.0% (92.0% to 92.0%) of full prefill's "
        "answer tokens, KL 0.030, on 1 questions of this collection"
    )


def test_at_the_same_charge_less_context_wins_and_then_the_smaller_distance():
    dense, sparse = "prophetkv@prompt+previous:2", "prophetkv:context_share=0.5@prompt+previous:2"
    assert chosen(row(0, dense, 0.1, 0.95, 0.01), row(0, sparse, 0.1, 0.95, 0.02)).strategy == sparse.partition("@")[0]
    assert chosen(row(0, dense, 0.1, 0.95, 0.02), row(0, "prophetkv@prompt", 0.1, 0.95, 0.01)).encoding == "plain"
    assert chosen(row(0, "prophetkv@prompt", 0.1, 0.95, 0.03), row(0, dense, 0.1, 0.95, 0.02)).encoding == "previous:2"


def test_where_nothing_is_enough_the_closest_is_taken_and_said():
    found = chosen(row(0, "prophetkv@prompt", 0.1, 0.5), row(0, "prophetkv@prompt+neighbours:3", 0.2, 0.7), wanted=0.99)
    assert (found.encoding, found.recompute_ratio, found.is_enough) == ("neighbours:3", 0.2, False)
    assert not found.has_lead_in


def test_half_of_the_context_is_tried_with_long_prompts_only():
    assert default_strategies(has_lead_in=False, is_long=False) == [
        "prophetkv:first_chunk=exact@prompt",
        "prophetkv:first_chunk=exact@prompt+previous:2",
        "prophetkv:first_chunk=exact@prompt+neighbours:3",
    ]
    long = default_strategies(has_lead_in=True, is_long=True)
    assert len(long) == 8
    assert long[-1] == "prophetkv:first_chunk=exact,context_share=0.5@prompt+corpus+previous:2"


@pytest.fixture
def engine():
    return ProphetKVEngine(tiny_llama(), tiny_tokenizer())


def measure(engine, rows, *, seconds=1000.0, questions=("one?", "two?", "three?"), **options):
    settings = {"opening": "Read this.\n", "lead_in": text_of(30, seed=99), "wanted_agreement": 0.5, "top_k": 3}
    return measure_collection(
        engine, DOCUMENTS, embed, rows, seconds=seconds, chunk_tokens=64, questions=questions, **(settings | options)
    )


def test_measured_on_a_collection(engine, tmp_path):
    profile = measure(engine, tmp_path / "rows.jsonl")
    assert profile.examples == 3
    assert {one.strategy for one in profile.strategies} == set(default_strategies(has_lead_in=True, is_long=False))
    assert profile.best is not None
    found = choose(profile)
    assert found.questions == 3
    assert found.is_enough
    assert engine.store.stats().chunks == 0  # nothing of it is left
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert measure(engine, tmp_path / "rows.jsonl") == profile  # all of it was there
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_rows_of_another_sample_or_setting_are_left_alone(engine, tmp_path, monkeypatch):
    """The sample depends on the time there is, so a file soon holds several."""
    rows, few = tmp_path / "rows.jsonl", ["prophetkv@prompt+neighbours:1"]
    whole = measure(engine, rows, strategies=few)
    size = rows.stat().st_size
    assert measure(engine, rows, strategies=few, top_k=2) != whole
    assert measure(engine, rows, strategies=few, opening="Read that.\n") != whole
    monkeypatch.setattr(choice, "_affordable_chunks", lambda *_: 6)
    assert measure(engine, rows, strategies=few) != whole
    assert rows.stat().st_size > 3 * size
    monkeypatch.undo()
    assert measure(engine, rows, strategies=few) == whole


class Clock:
    """Says that a second has passed whenever it is asked."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1.0
        return self.now


@pytest.mark.parametrize(("few", "done"), [(2, 2), (3, 2)])
def test_time_is_up(engine, tmp_path, monkeypatch, few, done):
    """No question is begun when it is; what was measured is picked from if it is enough."""
    monkeypatch.setattr(choice, "FEWEST", few)
    monkeypatch.setattr(choice, "_affordable_chunks", lambda *_: 16)
    rows, strategies = tmp_path / "rows.jsonl", ["prophetkv@prompt"]
    with monkeypatch.context() as patch:
        patch.setattr(choice, "time", Clock())
        if few == done:
            assert measure(engine, rows, strategies=strategies, seconds=2.5).examples == done
        else:
            with pytest.raises(TooLittleTimeError, match=r"2 of at least 3 .* 0\.0416\d+ minutes.*--minutes 2 should"):
                measure(engine, rows, strategies=strategies, seconds=2.5)
    assert measure(engine, rows, strategies=strategies).examples == 3  # goes on
    assert measure(engine, rows, strategies=strategies, seconds=0).examples == 3


def test_a_collection_of_one_chunk(engine, tmp_path):
    with pytest.raises(InputError, match="the collection has 1 chunks"):
        measure_collection(
            engine,
            [["only one"], [" "]],
            embed,
            tmp_path / "rows.jsonl",
            opening="",
            lead_in=None,
            wanted_agreement=0.9,
            seconds=1,
            top_k=2,
            chunk_tokens=64,
        )


def test_a_sample_is_stretches_of_documents_in_order():
    documents = [[f"{document} {number}" for number in range(40)] for document in range(9)]
    corpus = sample_corpus(documents, most=30)
    assert len(corpus.chunks) == 30
    for stretch in corpus.documents:
        document, first = map(int, stretch[0].split())
        assert list(stretch) == documents[document][first : first + len(stretch)]
    assert sample_corpus(documents, most=30).documents == corpus.documents
    assert sample_corpus(documents, seed=2, most=30).documents != corpus.documents


def test_questions_of_one_hop_and_of_two():
    chunks = [
        "The lighthouse of Aldermoor was built in the year that the harbour opened. Ferdinand kept it for decades.",
        "In Aldermoor the library holds forty thousand books beside the river. Gwendolyn counted all of them twice.",
        "Nothing of any kind is said here about the other two places, which lie far away from this one.",
    ]
    questions = make_questions(chunks, 10)
    assert make_questions(chunks, 10) == questions
    code = ["def f(x):\n    return x", "\u8fd9\u662f\u4e2d\u6587"]
    assert [part in one for part, one in zip(("def f(x)", code[1]), make_questions(code, 5), strict=True)] == [
        True,
        True,
    ]
    (two_hops,) = [one for one in questions if '"Aldermoor"' in one]
    assert '"Ferdinand"' in two_hops
    assert '"Gwendolyn"' in two_hops
    completed = [re.search(r'context: "(.*) \.\.\."', one) for one in questions if one.startswith("Which words")]
    assert len(completed) >= 3
    assert all(found and any(found[1] in chunk for chunk in chunks) for found in completed)


def test_questions_from_a_file(tmp_path):
    file = tmp_path / "questions"
    file.write_text('Who?\n\n{"question": "When?", "id": 1}\nWhere?\n')
    assert read_plain_questions(file, 2) == ["Who?", "When?"]
    for text, reason in (("", "holds no questions"), ('{"q": 1}', "no field 'question'"), ("{", "cannot be read")):
        file.write_text(text)
        with pytest.raises(InputError, match=reason):
            read_plain_questions(file, 5)
    with pytest.raises(InputError, match="cannot be read as questions"):
        read_plain_questions(tmp_path / "none", 5)
