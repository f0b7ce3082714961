"""`index --fidelity` and `calibrate --db`: what is measured on a collection, picked, and used from then on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prophetkv_rag.evaluation.quality import choice
from prophetkv_rag.profile import load_profile
from tests.cli.program import Run
from tests.tiny import text_of

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FEWEST", 2)
    monkeypatch.setattr(choice, "RATIOS", (0.1, 0.4))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.txt"
    file.write_text("What is it?\nWho was there?\nWhen?\n")
    return file


@pytest.fixture
def texts(docs: Path) -> Path:
    for number in range(3):
        (docs / f"long{number}.txt").write_text(" ".join(text_of(60, seed=20 + number + one) for one in range(4)))
    return docs


def settings() -> dict[str, object]:
    return json.loads(Path(".prophetkv/prophetkv-rag.json").read_text())


def test_index_measures_first(run: Run, texts: Path, questions: Path) -> None:
    printed = run("index", texts, "--chunk-size", 64, "--fidelity", 0.01, "--questions", questions)
    assert printed.startswith("picked: chunks behind ")
    assert "on 3 questions of this collection" in printed
    held = settings()
    assert held["recompute_ratio"] == 0.1  # 1% of the tokens are kept by anything
    assert held["encoding"] in ("plain", "previous:2", "neighbours:3")
    report = run("ask", "What is it?", "--json")["report"]
    assert report["recompute_ratio"] == 0.1
    run("index", texts)  # and it is remembered
    assert settings()["recompute_ratio"] == 0.1
    report = run("ask", "What is it?", "--recompute-ratio", 0.4, "--json")["report"]
    assert report["recompute_ratio"] == 0.4


def test_too_little_time_is_said_and_nothing_is_picked(run: Run, fails: Run, texts: Path, questions: Path) -> None:
    printed = run("index", texts, "--chunk-size", 64, "--fidelity", 0.9, "--minutes", 0, "--questions", questions)
    assert "picked: " not in printed
    held = settings()
    assert (held["encoding"], held["recompute_ratio"]) == ("previous:2", None)
    said = fails("calibrate", "--db", ".prophetkv", "--minutes", 0, "--questions", questions)
    assert "0 of at least 2 questions were measured in 0 minutes" in said
    assert "--minutes" in said
    assert settings() == held


def test_calibrate_on_a_database(run: Run, texts: Path, questions: Path, tmp_path: Path) -> None:
    run("index", texts, "--chunk-size", 64, "--encoding", "plain", "--lead-in", "none")
    before = settings()
    profile = tmp_path / "profile.json"
    arm = "prophetkv@prompt+previous:1"
    arguments = ("calibrate", "--db", ".prophetkv", "--questions", questions, "--agreement", 0.01, "--out", profile)
    printed = run(*arguments, "--strategy", arm)
    assert "picked: chunks behind previous:1, prophetkv at 10%" in printed
    assert "Not in use yet" in printed
    assert [one.strategy for one in load_profile(profile).strategies] == [arm]
    assert settings() == before
    printed = run(*arguments, "--strategy", arm, "--recompute-ratio", 0.25)
    assert "picked: chunks behind previous:1, prophetkv at 25%" in printed
    run(*arguments, "--strategy", arm, "--apply")
    assert (settings()["encoding"], settings()["recompute_ratio"]) == ("previous:1", 0.1)
    assert settings()["cached_for"] != before["cached_for"]
    found = run("ask", "What is it?", "--json")["report"]["chunks"]
    assert all(chunk["status"] == "hit" for chunk in found[1:])
    assert any(chunk["behind"] for chunk in found)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("index", "docs", "--fidelity", "0.9", "--encoding", "plain"), "--fidelity picks the encoding"),
        (("index", "docs", "--fidelity", "0.9", "--questions", "none.txt"), "none.txt cannot be read as questions"),
        (("calibrate", "model", "--db", ".prophetkv"), "leave MODEL, --dtype and --data out"),
        (("index", "docs", "--questions", "none.txt"), "--questions goes with --fidelity"),
        (("calibrate", "--apply"), "--questions and --apply go with --db"),
        (("calibrate", "--db", ".prophetkv"), "there is no database at .prophetkv"),
    ],
)
def test_bad_input(fails: Run, docs: Path, arguments: tuple[str, ...], reason: str) -> None:
    assert reason in fails(*arguments)
    assert not Path(".prophetkv/chroma.sqlite3").exists()
