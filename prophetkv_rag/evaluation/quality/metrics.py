"""The official metrics of RULER and LongBench v1, and two for a user's own questions.

Written from the definitions in NVIDIA/RULER (commit c3f5e3b) and THUDM/LongBench (2e00731), oddities included, so that
scores can be set beside published ones. `rouge` and `jieba` are imported by the metrics that need them, when they run:
`pip install "prophetkv-rag[bench]"`.
"""

from __future__ import annotations

import importlib
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from types import ModuleType

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.extras import needs

Metric = Callable[[str, Sequence[str], Sequence[str]], float]
"""`metric(prediction, references, classes)`: a score in [0, 1]."""

FIRST_LINE_TASKS = ("longbench_trec", "longbench_triviaqa", "longbench_samsum", "longbench_lsht")
"""Of these tasks' predictions LongBench marks the first line only: models go on with further examples."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CONTROL = re.compile(r"[\x00-\x1f]")
_NUMBER = re.compile(r"\d+")
_CHINESE_PUNCTUATION = (  # as in LongBench, which leaves out the opening marks 〈 and 《
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"  # noqa: RUF001
    "〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)


def score(example: TaskExample, prediction: str) -> float:
    """Mark a prediction as the example's task does: its pre-processing, then its metric.

    Returns:
        A score in [0, 1]; 0.0 where the example has no references.

    Raises:
        InputError: If the metric is unknown, or needs a package that is not installed.
    """
    metric = METRICS.get(example.metric)
    if metric is None:
        msg = f"unknown metric {example.metric!r} in task {example.task!r}; allowed: {', '.join(METRICS)}"
        raise InputError(msg)
    if example.task.removesuffix("_e") in FIRST_LINE_TASKS:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return metric(prediction, example.references, example.all_classes)


def string_match_all(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Fraction of the references that the prediction contains, whatever their case."""
    found = _contained(prediction, references)
    return sum(found) / len(found) if found else 0.0


def string_match_part(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """1.0 if the prediction contains one of the references, whatever its case."""
    return float(any(_contained(prediction, references)))


def _contained(prediction: str, references: Sequence[str]) -> list[bool]:
    cleaned = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [reference.lower() in cleaned for reference in references]


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces, in that order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _qa_f1(prediction: str, reference: str) -> float:
    return _f1(normalize_answer(prediction).split(), normalize_answer(reference).split())


def _qa_f1_zh(prediction: str, reference: str) -> float:
    return _f1(_chinese_words(prediction), _chinese_words(reference))


def _f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """F1 over multisets: a word counts as often as it stands on both sides."""
    common = (Counter(predicted) & Counter(expected)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _chinese_words(text: str) -> list[str]:
    words = ("".join(word.lower().translate(_ALL_PUNCTUATION).split()) for word in _segment(text))
    return [word for word in words if word]


def _best_subspan_em(prediction: str, reference: str) -> float:
    # Departs from lost-in-the-middle where nothing is left of a reference ("The"): there it matches every prediction.
    expected = normalize_answer(reference)
    return float(bool(expected) and expected in normalize_answer(prediction))


def _rouge_l(prediction: str, reference: str) -> float:
    rouge = _optional("rouge", "ROUGE-L").Rouge(metrics=["rouge-l"])
    try:
        # Any failure counts 0, as in LongBench: an empty text is a ValueError, a very long sentence a RecursionError.
        return float(rouge.get_scores([prediction], [reference], avg=True)["rouge-l"]["f"])
    except Exception:
        return 0.0


def _rouge_l_zh(prediction: str, reference: str) -> float:
    return _rouge_l(" ".join(_segment(prediction)), " ".join(_segment(reference)))


def classification(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """One over the number of classes named, if the true one is among them; parts of the true class do not count."""
    return max((_classified(prediction, reference, classes) for reference in references), default=0.0)


def _classified(prediction: str, truth: str, classes: Sequence[str]) -> float:
    named = [name for name in classes if name in prediction]
    position = 0
    while position < len(named):
        # LongBench removes from the list it walks through, so the class behind a removed one is never looked at and
        # stays, even if it too is a part of the true class. Kept: published scores have it.
        if named[position] in truth and named[position] != truth:
            del named[position]
        position += 1
    return 1 / len(named) if truth in named else 0.0


def _retrieval(prediction: str, reference: str) -> float:
    return _right_numbers(prediction, _paragraph_number(reference, r"Paragraph (\d+)"))


def _retrieval_zh(prediction: str, reference: str) -> float:
    return _right_numbers(prediction, _paragraph_number(reference, r"段落(\d+)"))


def _paragraph_number(reference: str, pattern: str) -> str:
    match = re.search(pattern, reference)
    if match is None:
        msg = f"the reference {reference!r} names no paragraph; needed: {pattern}"
        raise InputError(msg)
    return match[1]


def _right_numbers(prediction: str, truth: str) -> float:
    """Fraction of all numbers in the prediction that are the true one, compared as text."""
    numbers: list[str] = _NUMBER.findall(prediction)
    return numbers.count(truth) / len(numbers) if numbers else 0.0


def _code_similarity(prediction: str, reference: str) -> float:
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    # LongBench requires fuzzywuzzy without python-Levenshtein; its ratio then is difflib's, as a whole percentage
    # (rapidfuzz counts differently: up to 34 points apart on lines of this package).
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def _segment(text: str) -> list[str]:
    jieba = _optional("jieba", "a metric for Chinese")
    jieba.setLogLevel(logging.WARNING)  # else it tells on stderr how it loads its dictionary
    return [str(word) for word in jieba.cut(text, cut_all=False)]


def _optional(name: str, purpose: str) -> ModuleType:
    with needs("bench", name, what=purpose):
        return importlib.import_module(name)


def _best(mark: Callable[[str, str], float]) -> Metric:
    """The metric that marks against each reference and keeps the best score."""

    def metric(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
        return max((mark(prediction, reference) for reference in references), default=0.0)

    return metric


METRICS: dict[str, Metric] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "qa_f1": _best(_qa_f1),
    "qa_f1_zh": _best(_qa_f1_zh),
    "rouge_l": _best(_rouge_l),
    "rouge_l_zh": _best(_rouge_l_zh),
    "classification": classification,
    "retrieval": _best(_retrieval),
    "retrieval_zh": _best(_retrieval_zh),
    "count": _best(_right_numbers),
    "code_similarity": _best(_code_similarity),
    "best_subspan_em": _best(_best_subspan_em),
}


def try_metrics(names: Iterable[str]) -> None:
    """Run these once, so that a package that one needs is missed now and not after hours.

    Raises:
        MissingExtraError: If it is not installed.
    """
    for name in names:
        METRICS[name]("1", ["Paragraph 1, 段落1"], ["Paragraph 1"])
