"""Each metric on pairs worked out by hand from the official definitions."""

from __future__ import annotations

import sys

import pytest

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.quality.metrics import METRICS, normalize_answer, score, try_metrics
from prophetkv_rag.evaluation.tasks.example import TaskExample

NEEDS = {"qa_f1_zh": "jieba", "rouge_l": "rouge", "rouge_l_zh": "jieba"}


def example(
    metric: str, *references: str, classes: tuple[str, ...] = (), task: str = "longbench_hotpotqa"
) -> TaskExample:
    return TaskExample(task, "0", "", (), "", None, "", references, metric, 32, all_classes=classes)


def marked(metric: str, prediction: str, *references: str, classes: tuple[str, ...] = ()) -> float:
    return score(example(metric, *references, classes=classes), prediction)


@pytest.mark.parametrize(
    ("prediction", "references", "everything", "anything"),
    [
        ("ALPHA, gamma", ("alpha", "beta", "Gamma", "delta"), 0.5, 1.0),  # 2 of 4
        ("alpha beta", ("alpha", "beta"), 1.0, 1.0),
        ("1234567", ("234",), 1.0, 1.0),  # a substring is enough
        ("nothing", ("alpha",), 0.0, 0.0),
        ("", ("alpha",), 0.0, 0.0),
        ("alpha", (), 0.0, 0.0),
        ("x a\tb", ("a\nb",), 1.0, 1.0),  # a control character counts as a newline
        ("\x00 alpha", (" alpha",), 0.0, 0.0),  # becomes a newline, then is stripped with the space behind it
    ],
)
def test_string_match(prediction: str, references: tuple[str, ...], everything: float, anything: float) -> None:
    assert marked("string_match_all", prediction, *references) == everything
    assert marked("string_match_part", prediction, *references) == anything


def test_normal_form() -> None:
    assert normalize_answer("  The U.S.\tand an\nA-team; theatre!") == "us and ateam theatre"
    assert normalize_answer("a") == ""
    assert normalize_answer("an apple's") == "apples"
    assert normalize_answer("“quoted”") == "“quoted”"  # only ASCII punctuation goes
    assert normalize_answer("the-end") == "theend"  # punctuation goes before articles are looked for


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The Eiffel Tower!", ("eiffel tower",), 1.0),
        ("tower of Paris", ("Eiffel Tower",), 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),  # 0.4
        ("x x x", ("x y",), 0.4),  # multisets: one x in common, precision 1/3, recall 1/2
        ("x x y", ("x x z z",), 4 / 7),  # two in common: precision 2/3, recall 2/4
        ("red car", ("blue", "red", "red car wheel"), 0.8),  # best of 0, 2/3 and 0.8
        ("", ("red",), 0.0),
        ("the", ("the",), 0.0),  # nothing left on both sides is no match
        ("red", (), 0.0),
    ],
)
def test_qa_f1(prediction: str, references: tuple[str, ...], expected: float) -> None:
    assert marked("qa_f1", prediction, *references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("It was the Eiffel Tower, in Paris.", "Eiffel-Tower", 0.0),  # "eiffeltower"
        ("It was the Eiffel Tower, in Paris.", "The Eiffel Tower", 1.0),
        ("Paris", "Paris, France", 0.0),
        ("the answer", "The", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_best_subspan_em(prediction: str, reference: str, expected: float) -> None:
    assert marked("best_subspan_em", prediction, reference) == expected
    assert marked("best_subspan_em", prediction, "no such words", reference) == expected


def test_qa_f1_chinese() -> None:
    pytest.importorskip("jieba")
    # Words, by jieba's own README: 我 / 来到 / 北京 / 清华大学.
    assert marked("qa_f1_zh", "我来到北京清华大学。", "我来到北京") == pytest.approx(6 / 7)
    assert marked("qa_f1_zh", "「北京》！", "，北京") == 1.0  # noqa: RUF001
    assert marked("qa_f1_zh", "《北京", "北京") == pytest.approx(2 / 3)  # 《 is not in the official list
    assert marked("qa_f1_zh", "。", "。") == 0.0
    assert marked("qa_f1_zh", "", "北京") == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "the cat ran", 2 / 3),  # longest common subsequence: 2 words of 3 and 3
        ("sat cat the", "the cat sat", 1 / 3),  # order counts
        ("a b. c d", "a b c d", 1.0),  # subsequences are united over the prediction's sentences
        ("a a a", "a", 1.0),  # the package counts distinct words
        ("The cat", "the cat", 0.5),  # case counts: nothing is normalised
        ("", "the cat", 0.0),
        ("...", "the cat", 0.0),
        ("the cat", "", 0.0),
    ],
)
def test_rouge_l(prediction: str, reference: str, expected: float) -> None:
    pytest.importorskip("rouge")
    assert marked("rouge_l", prediction, reference) == pytest.approx(expected, abs=1e-7)
    assert marked("rouge_l", prediction, "zzz", reference) == pytest.approx(expected, abs=1e-7)


def test_rouge_l_chinese() -> None:
    pytest.importorskip("rouge")
    pytest.importorskip("jieba")
    assert marked("rouge_l_zh", "我来到北京清华大学", "我来到北京") == pytest.approx(6 / 7, abs=1e-7)
    assert marked("rouge_l_zh", "", "北京") == 0.0


@pytest.mark.parametrize(
    ("classes", "prediction", "reference", "expected"),
    [
        (("Date", "City"), "Date", "Date", 1.0),
        (("Date", "City"), "City", "Date", 0.0),
        (("Date", "City", "Money"), "Date or City", "Date", 1 / 2),
        (("Date", "City", "Money"), "Date, City, Money", "City", 1 / 3),
        (("Date", "City"), "date", "Date", 0.0),  # case counts
        (("Date", "City"), "", "Date", 0.0),
        (("City", "Other City"), "Other City", "Other City", 1.0),  # a part of the true class does not count
        (("City", "Other City"), "Other City", "City", 1 / 2),  # the other way round it does
        (("O", "Ot", "Other"), "Other", "Other", 1 / 2),  # Ot is skipped because O before it was removed
        (("O", "x", "Ot", "Other"), "Other x", "Other", 1 / 2),  # x is skipped instead: x and Other are left
        (("O", "Ot", "Oth", "Other"), "Other", "Other", 1 / 2),  # O and Oth are removed, Ot and Other are left
    ],
)
def test_classification(classes: tuple[str, ...], prediction: str, reference: str, expected: float) -> None:
    assert marked("classification", prediction, reference, classes=classes) == expected


@pytest.mark.parametrize(
    ("metric", "right"), [("retrieval", "Paragraph 12"), ("retrieval_zh", "段落12"), ("count", "12")]
)
@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Paragraph 12", 1.0),
        ("12 or 13, no: 12", 2 / 3),
        ("112", 0.0),
        ("012", 0.0),  # compared as text
        ("twelve", 0.0),
        ("", 0.0),
    ],
)
def test_numbers(metric: str, right: str, prediction: str, expected: float) -> None:
    assert marked(metric, prediction, right) == pytest.approx(expected)


def test_a_retrieval_reference_without_a_number_is_an_error() -> None:
    with pytest.raises(InputError, match="'12' names no paragraph"):
        marked("retrieval", "12", "12")


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("x = 1", "x = 1", 1.0),
        ("\n\n# a comment\n```python\nx = 1 // 2\nx = 1\ny = 2", "x = 1", 1.0),  # first line without `, # and //
        ("abcd", "bcde", 0.75),  # "bcd": 2 * 3 / 8
        ("qabxcd", "abycdf", 0.67),  # "ab" and "cd": 8 / 12, as a whole percentage
        ("tide", "diet", 0.25),  # difflib's matching blocks, not the longest common subsequence (0.5)
        ("# only a comment", "x = 1", 0.0),
        ("", "x = 1", 0.0),
        ("\n \n", "", 0.0),  # " " against nothing
        ("", "", 1.0),
    ],
)
def test_code_similarity(prediction: str, reference: str, expected: float) -> None:
    assert marked("code_similarity", prediction, reference) == expected


@pytest.mark.parametrize("task", ["trec", "triviaqa", "samsum", "lsht", "triviaqa_e"])
def test_few_shot_tasks_are_marked_by_their_first_line(task: str) -> None:
    row = example("qa_f1", "blue whale", task=f"longbench_{task}")
    assert score(row, "\n\nblue whale\nPassage: more") == 1.0
    assert score(row, "red\nblue whale") == 0.0
    assert score(row, " \nblue whale") == 0.0  # only newlines are skipped


def test_other_tasks_are_marked_whole() -> None:
    assert score(example("qa_f1", "blue whale"), "blue\nwhale") == 1.0


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_with_nothing_to_compare(metric: str) -> None:
    if metric in NEEDS:
        pytest.importorskip(NEEDS[metric])
    assert marked(metric, "something 1") == 0.0
    assert marked(metric, "") == 0.0


def test_every_metric_can_be_tried() -> None:
    """Those of paragraph numbers need one in a reference."""
    for metric in METRICS:
        pytest.importorskip(NEEDS.get(metric, "json"))
    try_metrics(METRICS)


def test_an_unknown_metric_lists_the_allowed_ones() -> None:
    with pytest.raises(InputError, match=r"'bleu' in task 'longbench_hotpotqa'; allowed: string_match_all, .*rouge_l"):
        marked("bleu", "x", "x")


@pytest.mark.parametrize(("metric", "package"), NEEDS.items())
def test_a_missing_package_is_named_with_its_remedy(metric: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"package '{package}'.*: pip install 'prophetkv-rag\[bench\]'"):
        marked(metric, "x", "x")
