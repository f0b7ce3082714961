"""`bench quality` and `calibrate` on a tiny random model: what they print and write, and a clear line for mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.cli.app import main
from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.tasks.loading import load_examples
from prophetkv_rag.evaluation.tasks.prompting import task_prompt
from prophetkv_rag.evaluation.tasks.ruler import Sources
from prophetkv_rag.evaluation.tasks.ruler.haystack import NOISE_LINE
from tests.tiny import save_tiny, text_of, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {
            "id": str(number),
            "question": "What opens at nine?",
            "answers": ["the library"],
            "passages": [{"title": "T", "text": text_of(40, seed=10 * number + k)} for k in range(4)],
        }
        for number in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys, *arguments):
    status = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


BASE = ("--rows", 2, "--length", 1000, "--chunk-tokens", 48, "--answer-tokens", 3)


def test_quality_json_tables_and_pictures(model, data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "rows.jsonl"
    arguments = ("bench", "quality", "--model", model, "--data", data, *BASE, "--out", out, "--recompute-ratio", 0.2)
    strategies = ("--strategy", "full_reuse", "--strategy", "prophetkv", "--strategy", "prophetkv@corpus")
    extra = ("--plots", tmp_path / "plots", "--markdown", tmp_path / "t.md", "--json")
    status, printed, _ = run(capsys, *arguments, *strategies, *extra)
    assert status == 0
    report = json.loads(printed)
    pooled = [entry for entry in report["arms"] if entry["task"] == "all"]
    assert [entry["strategy"] for entry in pooled] == ["full_prefill", "full_reuse", "prophetkv", "prophetkv@corpus"]
    assert all(entry["examples"] == 2 for entry in pooled)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"budget.png", "tasks_20.png", "picks.png"}
    assert "| prophetkv@corpus | 20% |" in (tmp_path / "t.md").read_text()
    # Again, with one strategy more: only that one is measured, and the tables show all.
    before = out.read_text()
    status, printed, _ = run(capsys, *arguments, *strategies, "--strategy", "epic:k=2", "--markdown", tmp_path / "t.md")
    assert status == 0
    assert out.read_text().startswith(before)
    assert len(out.read_text().splitlines()) == len(before.splitlines()) + 2
    assert "epic:k=2" in printed
    assert "all tasks pooled" in printed


def test_quality_on_a_generated_task(model, capsys):
    pytest.importorskip("wonderwords")
    arguments = ("--rows", 1, "--length", 1900, "--chunk-tokens", 256, "--answer-tokens", 2, "--recompute-ratio", 0.2)
    status, printed, _ = run(
        capsys, "bench", "quality", "--model", model, "--task", "ruler_niah_single_1", *arguments,
        "--strategy", "prophetkv", "--json",
    )  # fmt: skip
    assert status == 0
    arm = json.loads(printed)["arms"][0]
    assert arm["score"]["mean"] == 0.0  # a random model finds no needle
    assert run(capsys, "bench", "quality", "--task", "list")[1].split()[0] == "ruler_niah_single_1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "ruler_niah"), "unknown task 'ruler_niah'; allowed: ruler_niah_single_1"),
        ((), "nothing to measure"),
        (("--data", "none.jsonl"), "no file none.jsonl"),
        (("--data", "DATA", "--strategy", "prophet"), "unknown strategy 'prophet'"),
        (("--data", "DATA", "--recompute-ratio", "1.2"), "Invalid value for '--recompute-ratio'"),
        (("--data", "DATA", "--length", "130"), "no example fits 130 tokens"),
        (("--data", "BAD"), "line 1"),
        (("--data", "DATA", "--data", "DATA"), "two tasks or files have the same name: mine, mine"),
        (("--data", "DATA", "--markdown", "DATA/tables.md"), "results cannot be written"),
        (("--data", "DATA", "--plots", "DATA/plots"), "results cannot be written"),
        (("--data", "DATA", "--out", "DATA/rows.jsonl"), "cannot be used for results"),
        (("--data", "DATA", "--rows", "3", "--strategy", "prophetkv@corpus"), "has no example to spare"),
        (("--data", "DATA", "--length", "5000"), "--length is 5000, and the model's context window"),
        (("--data", "DATA", "--against", "prophetkvv"), "--against is 'prophetkvv', which is not measured; allowed: f"),
        (("--data", "DATA", "--markdown", "."), "results cannot be written"),
        (("--data", "DATA", "--out", "BINARY"), "cannot be used for results"),
        (("--data", "NOTHING"), "holds no questions"),
        (("--data", "NO_TEXT"), "passages of the question '1' is empty"),
        (("--data", "NO_ANSWER"), "answers of the question '1' is empty"),
    ],
)
def test_mistakes(model, data, tmp_path, capsys, arguments, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "1", "question": "q", "answers": ["a"]}\n')
    (tmp_path / "nothing.jsonl").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\n")
    one = {"id": "1", "question": "q", "answers": ["a"], "passages": [{"title": "", "text": " "}]}
    (tmp_path / "no_text.jsonl").write_text(json.dumps(one))
    (tmp_path / "no_answer.jsonl").write_text(json.dumps(one | {"answers": [], "passages": [{"text": "x"}]}))
    names = {"DATA": data, "BAD": bad, "BINARY": tmp_path / "binary", "NOTHING": tmp_path / "nothing.jsonl"}
    names |= {"NO_TEXT": tmp_path / "no_text.jsonl", "NO_ANSWER": tmp_path / "no_answer.jsonl"}
    given = [str(argument).replace("DATA", str(data)) for argument in arguments]
    given = [names.get(argument, argument) for argument in given]
    status, printed, errors = run(capsys, "bench", "quality", "--model", model, *given)
    assert (status, printed) == (2, "")
    assert message in errors.splitlines()[-1]


def test_the_lead_in_does_not_depend_on_the_number_of_rows(data):
    tokenizer = tiny_tokenizer()
    settings = {"tokenizer": tokenizer, "length": 1000, "chunk_tokens": 48}
    found = {rows: load_examples([], [data], rows=rows, **settings) for rows in (1, 2, 3)}
    assert [len(examples) for examples, _ in found.values()] == [1, 2, 3]
    last = "".join(found[3][0][-1].context)
    assert found[1][1] == found[2][1]
    assert found[1][1]["mine"].lead_in.strip() in last
    heads = {str(task_prompt(example, tokenizer, 48).prefix) for example in found[2][0]}
    assert heads == {found[1][1]["mine"].opening}
    assert found[3][1] == {}  # the last one is measured itself


def test_a_changed_question_is_not_answered_by_old_rows(model, data, tmp_path, capsys):
    arguments = ("bench", "quality", "--model", model, "--data", data, *BASE, "--out", tmp_path / "rows.jsonl")
    settings = ("--strategy", "full_reuse", "--recompute-ratio", 0.2, "--json")
    assert run(capsys, *arguments, *settings)[0] == 0
    data.write_text(data.read_text().replace("What opens at nine?", "What shuts at nine?"))
    status, printed, errors = run(capsys, *arguments, *settings)
    assert (status, printed) == (2, "")
    assert "measured on other text" in errors


def lead_ins(tmp_path, questions, rows=1):
    path = tmp_path / "mine.jsonl"
    lines = (
        {"id": str(number), "question": "q", "answers": ["a"], "passages": [{"text": text} for text in texts]}
        for number, texts in enumerate(questions)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_examples([], [path], rows=rows, tokenizer=tiny_tokenizer(), length=3000, chunk_tokens=48)[1]["mine"]


def test_no_question_of_the_file_holds_the_lead_in(tmp_path):
    texts = [text_of(150, seed=seed) for seed in range(6)]
    spare = [texts[0], texts[1], texts[2], texts[3]]
    plain = lead_ins(tmp_path, [[texts[4]], [texts[5]], spare]).lead_in
    assert plain.split()[0] in texts[2] or plain.split()[0] in texts[3]
    # Twelve words of it in a question that is not even measured, and the chunk before is taken.
    words = plain.split()
    assert lead_ins(tmp_path, [[texts[4]], [" ".join(words[20:31])], spare]).lead_in == plain  # eleven are no passage
    other = lead_ins(tmp_path, [[texts[4]], [" ".join(words[20:32])], spare]).lead_in
    assert other is not None
    assert other != plain
    assert other.split()[0] in " ".join(spare)
    # The last question has nothing of its own: the one before it is spared.
    assert lead_ins(tmp_path, [spare, [texts[5]], spare]).lead_in.split()[0] in texts[5]
    assert lead_ins(tmp_path, [[texts[4]], spare, spare]).lead_in is None


@pytest.mark.parametrize("task", ["ruler_niah_single_1", "ruler_niah_multikey_1", "ruler_vt", "ruler_cwe", "ruler_fwe"])
def test_no_prompt_of_a_generated_task_holds_its_lead_in(task):
    pytest.importorskip("wonderwords")
    settings = {"tokenizer": tiny_tokenizer(), "length": 6500, "chunk_tokens": 128}
    examples, surroundings = load_examples([task], [], rows=3, **settings)
    lead_in = surroundings[task].lead_in
    assert lead_in
    windows = {lead_in[start : start + 90] for start in range(len(lead_in) - 90)}
    noise = f"{NOISE_LINE} " * 8 + f"{NOISE_LINE}\n" * 8
    windows = {window for window in windows if window not in noise}
    for example in examples:
        context = "".join(example.context)
        assert not any(window in context for window in windows)


def test_a_source_text_that_goes_round_gives_no_lead_in(tmp_path):
    essay = tmp_path / "essay.txt"
    essay.write_text(". ".join(text_of(12, seed=seed).capitalize() for seed in range(20)) + ".")
    settings = {"tokenizer": tiny_tokenizer(), "length": 2600, "chunk_tokens": 128, "sources": Sources(essay)}
    pytest.importorskip("wonderwords")
    assert load_examples(["ruler_niah_multikey_1"], [], rows=1, **settings)[1]["ruler_niah_multikey_1"].lead_in is None


def test_calibrate_checks_its_files_first(model, data, tmp_path, capsys):
    for out in (tmp_path, "."):
        status, printed, errors = run(capsys, "calibrate", model, "--data", data, *BASE, "--out", out)
        assert (status, printed) == (2, "")
        assert "results cannot be written" in errors.splitlines()[-1]


def test_calibrate_writes_a_profile_that_the_engine_loads(model, data, tmp_path, capsys):
    out = tmp_path / "profiles" / "p.json"
    arguments = ("calibrate", model, "--data", data, *BASE, "--out", out, "--agreement", 0.01)
    ratios = ("--recompute-ratio", 0.1, "--recompute-ratio", 0.5)
    status, printed, _ = run(capsys, *arguments, *ratios, "--json")
    assert status == 0
    profile = json.loads(printed)
    assert profile["examples"] == 2
    assert [point["recompute_ratio"] for point in profile["strategies"][0]["curve"]] == [0.1, 0.5]
    assert (profile["chunk_tokens"], profile["answer_tokens"]) == (48, 3)
    engine = ProphetKVEngine.from_pretrained(model, profile=out)
    assert engine.config.recompute_ratio == profile["strategies"][0]["recompute_ratio"]
    rows = Path(out.with_suffix(".rows.jsonl")).read_text()
    assert run(capsys, *arguments, *ratios)[0] == 0
    assert Path(out.with_suffix(".rows.jsonl")).read_text() == rows  # nothing was measured twice


def test_loading_is_timed_for_every_format_and_way(model, capsys):
    arguments = ("--model", model, "--context", 64, "--chunk-tokens", 32, "--rounds", 2)
    status, printed, _ = run(capsys, "bench", "load", *arguments, "--format", "int8", "--format", "exact+key", "--json")
    assert status == 0
    rows = json.loads(printed)["load"]
    ways = {"read", "two threads", "whole file first", "mapped"}
    for name, expected in (("int8", ways), ("exact, encrypted", ways - {"whole file first", "mapped"})):
        for is_cold in (False, True):
            found = {row["way"]: row for row in rows if row["blob_format"] == name and row["is_cold"] == is_cold}
            assert set(found) == expected
            assert found["read"]["ratio"] == found["read"]["cpu_ratio"] == 1
            assert all(row["total_ms"] > row["load_ms"] > 0 < row["share_of_ttft"] for row in found.values())
    status, printed, error = run(capsys, "bench", "load", "--format", "zip")
    assert (status, printed) == (2, "")
    assert "allowed: exact" in error


def test_a_large_catalog(capsys):
    status, printed, _ = run(capsys, "bench", "store", "--entries", 300, "--json")
    assert status == 0
    report = json.loads(printed)
    assert (report["entries"], report["rounds"], report["prompt_chunks"]) == (300, 5, 40)
    times = ("store_ms", "open_ms", "open_cpu_ms", "find_ms", "look_up_us", "add_us", "new_entries_us")
    assert all(report[name] > 0 for name in times)
    status, printed, _ = run(capsys, "bench", "store", "--entries", 10)
    assert status == 0
    assert "10 chunks: opened in" in printed


def test_calibrate_compares_encodings(model, data, tmp_path, capsys):
    out = tmp_path / "p.json"
    arguments = ("calibrate", model, "--data", data, *BASE, "--out", out, "--agreement", 0.01)
    arms = ("prophetkv", "prophetkv@corpus", "prophetkv@prompt+corpus", "full_reuse@corpus")
    chosen = [word for arm in arms for word in ("--strategy", arm)]
    status, printed, _ = run(capsys, *arguments, *chosen, "--recompute-ratio", 0.1, "--recompute-ratio", 0.5)
    assert status == 0
    assert all(arm in printed for arm in arms)
    assert "prompt_template is @prompt" in " ".join(printed.split())
    # The same arms measured by `bench quality`, which knows encodings of its own accord, say the same.
    rows = tmp_path / "bench.jsonl"
    assert run(
        capsys, "bench", "quality", "--model", model, "--data", data, *BASE, "--out", rows, "--recompute-ratio", 0.1,
        "--recompute-ratio", 0.5, *chosen,
    )[0] == 0  # fmt: skip
    measured = [json.loads(line) for line in rows.read_text().splitlines()[1:]]
    profile = json.loads(out.read_text())
    assert {one["strategy"] for one in profile["strategies"]} == set(arms)
    for one in profile["strategies"]:
        for point in one["curve"]:
            arm = (one["strategy"], point["recompute_ratio"])
            kls = [row["kl"] for row in measured if (row["strategy"], row["recompute_ratio"]) == arm]
            assert point["kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-5)
    assert len({one["curve"][0]["kl"] for one in profile["strategies"]}) == len(
        arms
    )  # caches of three kinds, none twice
    settings = {"tokenizer": tiny_tokenizer(), "rows": 2, "length": 1000, "chunk_tokens": 48}
    lead_in = load_examples([], [data], **settings)[1]["mine"].lead_in
    assert lead_in[:20] not in out.read_text()
    config = ProphetKVConfig(lead_in=lead_in, prompt_template="Read.\n{context}")
    engine = ProphetKVEngine.from_pretrained(model, config=config, profile=out)
    assert (engine.config.strategy, engine.config.recompute_ratio) == ("prophetkv", 0.1)
    with pytest.raises(InputError, match="--strategy prophetkv@prompt too"):
        ProphetKVEngine.from_pretrained(model, config=ProphetKVConfig(prompt_template="Read.\n{context}"), profile=out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategy", "prophetkv@nothing"), "unknown encoding 'nothing'; allowed: prompt, corpus, and previous:N"),
        (("--strategy", "prophet@corpus"), "unknown strategy 'prophet'"),
        (("--rows", "3", "--strategy", "prophetkv@corpus"), "no example to spare for 'corpus'; give fewer --rows"),
        (("--agreement", "1.5"), "Invalid value for '--agreement'"),
    ],
)
def test_calibrate_mistakes(model, data, tmp_path, capsys, arguments, message):
    given = ("calibrate", model, "--data", data, *BASE, "--out", tmp_path / "p.json", *arguments)
    status, printed, errors = run(capsys, *given)
    assert (status, printed) == (2, "")
    assert message in errors.splitlines()[-1]
    assert not (tmp_path / "p.json").exists()
