"""LongBench's official prompts and files, on made-up rows, and a user's own questions."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.quality.metrics import METRICS, score
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.longbench import (
    LONGBENCH_E_TASKS,
    LONGBENCH_TASKS,
    load_longbench,
    truncate_example,
    truncate_middle,
)
from prophetkv_rag.evaluation.tasks.longbench_units import split_context
from prophetkv_rag.evaluation.tasks.own_data import load_questions

OFFICIAL = json.loads(files("prophetkv_rag.evaluation.tasks").joinpath("longbench_prompts.json").read_text("utf-8"))
CONTEXTS = {
    "Passage": "Passage 1:\nA {b}\nc\n\nd\nPassage 2:\nsee Passage 3: e\n\nPassage 11:\nf",
    "Paragraph": "Paragraph 1: a\n\nParagraph 2: b\nc",
    "plain": "first\nline\n\n\nsecond {context} {input} %s\n",
}


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def row(**changes: Any) -> dict[str, Any]:
    return {
        "input": "Who {knows}?",
        "context": CONTEXTS["Passage"],
        "answers": ["Ann", "Bo"],
        "length": 7,
        "dataset": "any",
        "language": "en",
        "all_classes": ["Date", "City"],
        "_id": "f00d",
        **changes,
    }


def prompt(example: TaskExample) -> str:
    return "".join((example.before, *example.context, example.after, example.answer_prefix))


def sha256(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def test_prompts_and_lengths_are_the_official_ones() -> None:
    """The digests are those of dataset2prompt.json and dataset2maxlen.json at THUDM/LongBench 2e00731."""
    assert sha256(OFFICIAL["prompts"]) == "e7d865d712fe45e2455f5e864ac474001d7758d68d349e76ffbcdd382483358f"
    assert sha256(OFFICIAL["max_new_tokens"]) == "39a79d9491ead3dc8bcea6dbd8b963b29248eb4c344dde1e176b0a58b4e758a9"
    assert "Copyright (c) 2023 THU-KEG & Zhipu AI" in OFFICIAL["license"]
    assert set(LONGBENCH_TASKS) == set(OFFICIAL["prompts"]) == set(OFFICIAL["max_new_tokens"])
    assert len(LONGBENCH_TASKS) == 21


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("task", LONGBENCH_TASKS + LONGBENCH_E_TASKS)
def test_every_task_has_the_official_prompt(task: str, context: str, tmp_path: Path) -> None:
    write(tmp_path / f"{task}.jsonl", row(context=context))
    [example] = load_longbench(task, tmp_path)
    base = task.removesuffix("_e")
    assert prompt(example) == OFFICIAL["prompts"][base].format(context=context, input="Who {knows}?")
    assert "".join(example.context) == context
    assert len(example.context) > 1
    assert example.max_new_tokens == OFFICIAL["max_new_tokens"][base]
    assert example.chat == (base not in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))
    assert example.stop_at_newline == (base == "samsum")
    assert example.all_classes == (("Date", "City") if base in ("trec", "lsht") else ())
    assert (example.task, example.example_id) == (f"longbench_{task}", "f00d")
    assert example.references == ("Ann", "Bo")
    assert example.query is None or example.query in example.after
    assert example.metric in METRICS


def test_metrics_are_the_official_ones(tmp_path: Path) -> None:
    by_metric = {
        "qa_f1": "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa",
        "qa_f1_zh": "multifieldqa_zh",
        "rouge_l": "gov_report qmsum multi_news samsum",
        "rouge_l_zh": "dureader vcsum",
        "classification": "trec lsht",
        "retrieval": "passage_retrieval_en",
        "retrieval_zh": "passage_retrieval_zh",
        "count": "passage_count",
        "code_similarity": "lcc repobench-p",
    }
    expected = {task: metric for metric, tasks in by_metric.items() for task in tasks.split()}
    for task in LONGBENCH_TASKS:
        write(tmp_path / f"{task}.jsonl", row())
    assert {task: load_longbench(task, tmp_path)[0].metric for task in LONGBENCH_TASKS} == expected


def test_the_query_is_the_question_alone(tmp_path: Path) -> None:
    for task in LONGBENCH_TASKS:
        write(tmp_path / f"{task}.jsonl", row())
    without = {task for task in LONGBENCH_TASKS if load_longbench(task, tmp_path)[0].query is None}
    assert without == {"gov_report", "multi_news", "vcsum", "passage_count", "lcc", "repobench-p"}
    assert load_longbench("hotpotqa", tmp_path)[0].query == "Who {knows}?"


def test_code_tasks_end_with_the_code_to_complete(tmp_path: Path) -> None:
    write(tmp_path / "repobench-p.jsonl", row(context="src/a.py\nx = 1\nsrc/b.py\n", input="import a\n"))
    write(tmp_path / "lcc.jsonl", row(context="x = 1\n", input=""))
    [repobench], [lcc] = load_longbench("repobench-p", tmp_path), load_longbench("lcc", tmp_path)
    assert repobench.context == ("src/a.py\nx = 1\n", "src/b.py\n")
    assert repobench.after == "import a\nNext line of code:\n"
    assert lcc.before == "Please complete the code given below. \n"
    assert lcc.after == "Next line of code:\n"


def test_a_loaded_row_can_be_marked(tmp_path: Path) -> None:
    write(tmp_path / "trec_e.jsonl", row(answers=["City"]))
    [example] = load_longbench("trec_e", tmp_path)
    assert score(example, "\nCity\nQuestion: Date") == 1.0


@pytest.mark.parametrize(
    ("task", "context", "expected"),
    [
        ("musique", "Passage 1:\na\n\nb\nPassage 2:\nc\n", ("Passage 1:\na\n\nb\n", "Passage 2:\nc\n")),
        ("hotpotqa_e", "intro\nPassage 1:\na", ("intro\n", "Passage 1:\na")),
        ("passage_count", "Paragraph 1: a\n\nParagraph 2: b", ("Paragraph 1: a\n\n", "Paragraph 2: b")),
        ("passage_retrieval_zh", "段落1：甲\n\n段落2：乙", ("段落1：甲\n\n", "段落2：乙")),  # noqa: RUF001
        ("trec", "Question: a\nType: A\nQuestion: b\nType: B", ("Question: a\nType: A\n", "Question: b\nType: B")),
        ("samsum", "Dialogue: a\nSummary: A\nDialogue: b", ("Dialogue: a\nSummary: A\n", "Dialogue: b")),
        ("triviaqa", "Passage:\na\nAnswer:\nA\n\nPassage:\nb", ("Passage:\na\nAnswer:\nA\n\n", "Passage:\nb")),
        ("qasper", "a\nb\n\n\nc\n\nd", ("a\nb\n\n\n", "c\n\n", "d")),  # paragraphs
        ("qmsum", "A: hi\nB: ho\n", ("A: hi\n", "B: ho\n")),  # lines, where there are no paragraphs
        ("musique", "only one\n\nPassage without a number", ("only one\n\n", "Passage without a number")),
        ("qmsum", "\nA: hi\n \nB: ho", ("\nA: hi\n \n", "B: ho")),  # no unit is blank
        (
            "gov_report",
            "One (see fig. 1). The U.S. Army did. 2 more!",
            ("One (see fig. 1). ", "The U.S. Army did. 2 more!"),
        ),
        ("gov_report", 'He said "so." Then he left? "No."', ('He said "so." ', "Then he left? ", '"No."')),
        ("vcsum", "甲说。乙问！丙？！", ("甲说。", "乙问！", "丙？！")),  # noqa: RUF001
        ("narrativeqa", "one line", ("one line",)),
        ("narrativeqa", "", ()),
    ],
)
def test_context_is_cut_at_its_natural_units(task: str, context: str, expected: tuple[str, ...]) -> None:
    assert split_context(task, context) == expected


SHAPES = {
    "narrativeqa": ("Transcribed from\n\n\n   THE FUND\n\n\n\nThey\nmet.\n\n", "They left."),
    "qasper": ("Introduction\n", "Words are vectors. They help.\n", "Method\n", "We train."),
    "multifieldqa_en": ("Address: London.\n", "Reduced intake extends life.\n", "See (B)."),
    "multifieldqa_zh": ("第一段。它很长。\n", "第二段。"),
    "hotpotqa": ("Passage 1:\nNobody\nA song.\n\nCharts\n", "Passage 2:\nRecords\nA label."),
    "2wikimqa": ("Passage 1:\nHenry\nBorn 1913.\n", "Passage 2:\nSamuel\nDied 1735.\n\nSee also"),
    "musique": ("Passage 1:\nBull\nA drink.\n\n", "Passage 2:\nSteel\nImports\nNet."),
    "dureader": ("文章1\n标题：甲\n内容。\n", "文章2\n标题：乙\n内容。"),  # noqa: RUF001
    "gov_report": (
        "Schools must be 1) certified by the U.S. Department (See table 1.) ",
        "The agency agreed. ",
        "GAO did.",
    ),
    "qmsum": ("Manager: So welcome . Hello .\n", "Designer: {vocalsound}\n", "Manager: Okay ."),
    "multi_news": ("Passage 1:\nA study NEWLINE_CHAR NEWLINE_CHAR found it.\n", "Passage 2:\nAnother.\n"),
    "vcsum": ("主持人：大家好。开始吧。\n", "嘉宾：好的。"),  # noqa: RUF001
    "trec": ("Question: Who ?\nType: Individual\n", "Question: Where ?\nType: City"),
    "triviaqa": ("Passage:\nCalf\n\nA feast.\nQuestion:\nWhat?\nAnswer:\nA calf\n", "Passage:\nTack\nAnswer:\nA pin\n"),
    "samsum": ("Dialogue: T: Yo\r\nH: :) \nSummary: T greets.\n", "Dialogue: L: Hi\r\nO: Ho\nSummary: They meet.\n"),
    "lsht": ("新闻内容：\n甲\n类别：体育\n", "新闻内容：\n乙\n类别：财经\n"),  # noqa: RUF001
    "passage_count": ("Paragraph 1: A station.\n\n", "Paragraph 2: A team."),
    "passage_retrieval_en": ("Paragraph 1: A match. Won.\n\n", "Paragraph 2: A suit."),
    "passage_retrieval_zh": ("段落1：甲\n\n", "段落2：乙"),  # noqa: RUF001
    "lcc": ("#!/usr/bin/env python\n", "from a import b\n", "class C(b):\n", "    def d(self):\n"),
    "repobench-p": (
        "error.py\nclass E(Exception):\n\n    path = 'a/b.py'\n",
        "src/main/java/io/Log.java\n// see Other.java\nclass Log {\n}\n",
        "error.py\nimport error.py\n",
    ),
}
"""Contexts of the shape that the official files have, as the units that they consist of."""


@pytest.mark.parametrize("task", LONGBENCH_TASKS + LONGBENCH_E_TASKS)
def test_every_task_s_rows_are_cut_into_the_units_they_have(task: str, tmp_path: Path) -> None:
    units = SHAPES[task.removesuffix("_e")]
    write(tmp_path / f"{task}.jsonl", row(context="".join(units)))
    [example] = load_longbench(task, tmp_path)
    assert "".join(example.context) == "".join(units)
    if task != "narrativeqa":  # a book has as many as it has paragraphs
        assert example.context == units
    assert len(example.context) > 1
    assert all(unit.strip() for unit in example.context)


@pytest.mark.parametrize("name", ["qasper.jsonl", "qasper.jsonl.gz", "data/qasper.jsonl", "data/qasper.jsonl.gz"])
def test_where_files_may_lie(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, row(_id="a"), "", row(_id="b"), row(_id="c"))
    assert [example.example_id for example in load_longbench("qasper", tmp_path)] == ["a", "b", "c"]
    assert [example.example_id for example in load_longbench("qasper", tmp_path, limit=2)] == ["a", "b"]


def archive(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("data/qasper.jsonl", json.dumps(row(context="甲\n\n乙"), ensure_ascii=False) + "\n{")
    return path


def test_the_archive_is_read_as_it_is(tmp_path: Path) -> None:
    path = archive(tmp_path / "data.zip")
    assert load_longbench("qasper", path, limit=1)[0].context == ("甲\n\n", "乙")
    with pytest.raises(InputError, match=r"data\.zip:data/qasper\.jsonl, line 2: not JSON"):
        load_longbench("qasper", path)
    with pytest.raises(InputError, match=r"no data/trec\.jsonl in .*Download https"):
        load_longbench("trec", path)


def test_without_a_folder_the_archive_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(*arguments: str, **options: str) -> str:
        asked.append((arguments, options))
        return str(archive(tmp_path / "data.zip"))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert len(load_longbench("qasper", limit=1)) == 1
    assert asked == [(("THUDM/LongBench", "data.zip"), {"repo_type": "dataset"})]


def test_offline_says_what_to_download_and_where_to_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: str, **options: str) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    expected = r"no route\)\. Download https://huggingface\.co/datasets/THUDM/LongBench/.*data\.zip .* give its path"
    with pytest.raises(InputError, match=expected):
        load_longbench("qasper")


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'qasper': none of qasper\.jsonl, .*data/qasper\.jsonl\.gz in .*Download"):
        load_longbench("qasper", tmp_path)


@pytest.mark.parametrize("task", ["nq", "musique_e", "", "../qasper"])
def test_an_unknown_task_lists_the_allowed_ones(task: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown LongBench task .*allowed: narrativeqa, .*repobench-p, qasper_e, "):
        load_longbench(task, tmp_path)


@pytest.mark.parametrize("field", ["input", "context", "answers", "_id", "all_classes"])
def test_a_missing_field_names_file_line_and_field(field: str, tmp_path: Path) -> None:
    bad = {name: value for name, value in row().items() if name != field}
    path = write(tmp_path / "trec.jsonl", row(), "", bad)
    with pytest.raises(InputError) as caught:
        load_longbench("trec", tmp_path)
    assert f"{path}, line 3: field {field!r}" in str(caught.value)
    assert "is missing" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [("answers", "Ann"), ("answers", [1]), ("context", None), ("_id", 3), ("all_classes", None)]
)
def test_a_wrong_type_is_named(field: str, value: object, tmp_path: Path) -> None:
    write(tmp_path / "trec.jsonl", row(**{field: value}))
    with pytest.raises(InputError, match=rf"trec\.jsonl, line 1: field '{field}' must be a (list of )?texts?, not"):
        load_longbench("trec", tmp_path)


def test_tasks_without_classes_have_null_there(tmp_path: Path) -> None:
    write(tmp_path / "qasper.jsonl", row(all_classes=None))
    assert load_longbench("qasper", tmp_path)[0].all_classes == ()


@pytest.mark.parametrize("line", ["{", "[1]", "3"])
def test_a_line_that_is_no_row(line: str, tmp_path: Path) -> None:
    write(tmp_path / "qasper.jsonl", row(), line)
    with pytest.raises(InputError, match=r"qasper\.jsonl, line 2: "):
        load_longbench("qasper", tmp_path)


def test_a_damaged_file_is_an_input_error(tmp_path: Path) -> None:
    path = write(tmp_path / "qasper.jsonl.gz", *(row(context=f"{n}" * 999) for n in range(50)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"qasper\.jsonl\.gz, behind line \d+: cannot be read"):
        load_longbench("qasper", tmp_path)


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def decode(tokens: Any) -> str:
    return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(2, "aj"), (4, "abij"), (5, "abij"), (9, "abcdghij"), (10, "abcdefghij"), (11, "abcdefghij")],
)
def test_truncation_keeps_both_ends(max_tokens: int, expected: str) -> None:
    assert truncate_middle("abcdefghij", max_tokens, encode, decode) == expected


@pytest.mark.parametrize("max_tokens", [1, 0, -4])
def test_truncation_needs_two_tokens(max_tokens: int) -> None:
    with pytest.raises(InputError, match=f"to {max_tokens} tokens: at least 2"):
        truncate_middle("abc", max_tokens, encode, decode)


def test_a_truncated_example_has_the_truncated_prompt_in_its_parts(tmp_path: Path) -> None:
    write(tmp_path / "musique.jsonl", row())
    [example] = load_longbench("musique", tmp_path)
    whole = prompt(example)
    for max_tokens in range(2, len(whole) + 2):
        cut = truncate_example(example, max_tokens, encode, decode)
        assert prompt(cut) == truncate_middle(whole, max_tokens, encode, decode)
        assert example.before.startswith(cut.before)
        assert example.after.endswith(cut.after)
        assert all(cut.context)
        assert cut.query is None or cut.query in cut.after
    assert truncate_example(example, len(whole), encode, decode) is example


def test_truncation_takes_the_middle_out_of_the_context() -> None:
    example = TaskExample("t", "0", "<<", ("one ", "two ", "three ", "four"), ">> q?", "q?", "", ("x",), "qa_f1", 8)
    cut = truncate_example(example, 22, encode, decode)  # of 25 characters 3 go: "hre"
    assert (cut.before, cut.context, cut.after) == ("<<", ("one ", "two ", "te ", "four"), ">> q?")
    cut = truncate_example(example, 16, encode, decode)  # "<<one tw" and "our>> q?"
    assert (cut.before, cut.context, cut.after) == ("<<", ("one ", "tw", "our"), ">> q?")
    assert cut.query == "q?"
    short = truncate_example(example, 6, encode, decode)
    assert (short.before, short.context, short.after, short.query) == ("<<", ("o",), " q?", "q?")
    assert truncate_example(example, 2, encode, decode).query is None


QUESTION = {
    "id": 7,
    "question": "Who {lives} there?",
    "answers": ["Ann", "Bo"],
    "passages": [{"title": "House", "text": "Ann lives {here}."}, {"text": "Bo left."}, {"title": "", "text": "End."}],
}


def test_own_data(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", QUESTION, {**QUESTION, "id": "8"})
    first, _ = load_questions(path)
    assert first.context == ("House\nAnn lives {here}.\n\n", "Bo left.\n\n", "End.")
    assert prompt(first) == (
        "Context information is below.\n---------------------\nHouse\nAnn lives {here}.\n\nBo left.\n\nEnd.\n"
        "---------------------\nGiven the context information and not prior knowledge, answer the query.\n"
        "Query: Who {lives} there?\nAnswer: "
    )
    assert (first.task, first.example_id, first.query) == ("own_data", "7", "Who {lives} there?")
    assert (first.references, first.metric, first.max_new_tokens) == (("Ann", "Bo"), "qa_f1", 32)
    assert first.chat
    assert first.answer_prefix == ""
    assert score(first, "It is Ann.") == pytest.approx(0.5)
    assert len(load_questions(path, limit=1)) == 1


def test_own_data_prompt_is_llama_index_s_default(tmp_path: Path) -> None:
    prompts = pytest.importorskip("llama_index.core.prompts.default_prompts")
    [example] = load_questions(write(tmp_path / "mine.jsonl", QUESTION))
    text = prompts.DEFAULT_TEXT_QA_PROMPT.format(context_str="".join(example.context), query_str="Who {lives} there?")
    assert prompt(example) == text


def test_own_data_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        load_questions(tmp_path / "none.jsonl")
    missing = {name: value for name, value in QUESTION.items() if name != "answers"}
    with pytest.raises(InputError, match=r"mine\.jsonl, line 2: answers is missing"):
        load_questions(write(tmp_path / "mine.jsonl", QUESTION, missing))
    for name, empty in (("passages", []), ("passages", [{"title": "", "text": " "}]), ("answers", [])):
        with pytest.raises(InputError, match=f"{name} of the question '7' is empty"):
            load_questions(write(tmp_path / "mine.jsonl", {**QUESTION, name: empty}))
    with pytest.raises(InputError, match="id '7' is there twice"):
        load_questions(write(tmp_path / "mine.jsonl", QUESTION, QUESTION))
