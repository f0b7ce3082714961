"""The program itself: version, help, JSON, exit statuses, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prophetkv_rag import __version__
from prophetkv_rag.cli.console import print_json, results, take_any_text
from tests.cli.program import Run, index_tiny
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("offline")


def test_version_and_help(run: Run) -> None:
    assert run("--version") == f"prophetkv-rag {__version__}\n"
    for command in ((), ("index",), ("ask",), ("demo",), ("doctor",), ("cache",), ("cache", "verify")):
        assert "--help" in run(*command, "--help")


def test_everything_printed_with_json_is_json(docs: Path, tiny_model: Path, tmp_path: Path) -> None:
    """In a process of its own, so that nothing a library prints is missed."""
    command = [sys.executable, "-m", "prophetkv_rag.cli.app", "doctor", str(tiny_model), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(result.stdout)["supported"] is True


def test_missing_and_unsuitable_directories(fails: Run, docs: Path) -> None:
    assert "nowhere does not exist" in fails("index", "nowhere")
    assert "is not a directory" in fails("index", docs / "one.txt")
    Path("empty").mkdir()
    assert "holds no text files" in fails("index", "empty")
    (Path("empty") / "x.bin").write_bytes(b"\0\1")
    assert "x.bin: binary" in fails("index", "empty")
    assert not Path(".prophetkv").exists()


def test_a_database_that_is_not_there(fails: Run) -> None:
    for command in (("ask", "Who?"), ("cache", "stats"), ("cache", "verify", "--json")):
        assert "there is no database at .prophetkv; make one with: prophetkv-rag index DIR" in fails(*command)


def test_a_database_that_cannot_be_written(fails: Run, docs: Path) -> None:
    Path("file").write_text("x")
    assert "the database directory file/db cannot be used" in fails("index", docs, "--db", "file/db")
    assert "is not a directory" in fails("index", docs, "--db", "file")


def test_a_database_that_is_broken(fails: Run, run: Run, docs: Path) -> None:
    index_tiny(run, docs)
    settings = Path(".prophetkv/prophetkv-rag.json")
    settings.write_text("{")
    assert "prophetkv-rag.json cannot be read" in fails("ask", "Who?")


def test_unknown_models(fails: Run, run: Run, docs: Path) -> None:
    assert "there is no model 'no/such-model'" in fails("index", docs, "--model", "no/such-model")
    assert "there is no model 'not/a/name'" in fails("doctor", "not/a/name")
    assert "cannot load a model from" in fails("doctor", docs)
    index_tiny(run, docs)
    assert "there is no model 'no/such-model'" in fails("ask", "Who?", "--model", "no/such-model", "--json")
    save_tiny(Path("gone"))
    index_tiny(run, docs, "--model", "gone", "--db", "other")
    Path("gone").rename("moved")
    assert "/gone" in fails("ask", "Who?", "--db", "other")


def test_other_mistakes(fails: Run, run: Run, docs: Path) -> None:
    assert "the question is empty" in fails("ask", "  ")
    assert "Missing argument" in fails("ask")
    assert "No such command" in fails("answer")
    assert "Invalid value for '--chunk-size'" in fails("index", docs, "--chunk-size", 63)
    assert "context window of 2048" in fails("index", docs, "--chunk-size", 2048)


def program(*arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The program in a process of its own, offline, with these variables."""
    command = [sys.executable, "-m", "prophetkv_rag.cli.app", *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, env={**os.environ, **offline, **environment}, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_results_and_errors_are_printed_in_any_encoding(encoding: str) -> None:
    Path("日本").mkdir()
    plain = program("doctor", "日本", PYTHONIOENCODING=encoding)
    assert plain.returncode == 2
    assert b"Traceback" not in plain.stderr
    assert b"prophetkv-rag: error: " in plain.stderr
    odd = program("index", b"caf\xe9", PYTHONIOENCODING=encoding)
    assert odd.returncode == 2
    assert b"Traceback" not in odd.stderr
    assert b"does not exist" in odd.stderr


class Stream(io.TextIOWrapper):
    """Standard output as a redirect on Windows has it."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf-16"])
def test_json_stays_json_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"text": "Grüße → 東京 😀 \x81", "caf\udce9": ["\ud835", 1]}
    stream = Stream(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    take_any_text()
    print_json(value)
    results().print("→ 東京 \udce9 …", markup=False)
    text = stream.text()
    found, end = json.JSONDecoder().raw_decode(text)
    assert found == {"text": value["text"], "caf\ufffd": ["\ufffd", 1]}
    assert text[end:].strip()


def test_files_of_any_name_and_encoding_are_indexed_or_named(run: Run) -> None:
    docs = Path("docs")
    (docs / os.fsdecode(b"d\xff")).mkdir(parents=True)
    words = "The museum opens at ten o'clock, says the sign → at its old door."
    for name, content in {
        b"caf\xe9.txt": words.encode(),
        rb"caf\xe9.txt": words.encode(),
        b"d\xff/deep.txt": f"{words} Deep.".encode(),
        b"wide.txt": f"{words} Wide.".encode("utf-16"),
        b"marked.txt": f"{words} Marked.".encode("utf-8-sig"),
        b"latin.txt": "Grüße".encode("latin-1"),
        b"unmarked.txt": words.replace("→", "-").encode("utf-16-le"),
    }.items():
        (docs / os.fsdecode(name)).write_bytes(content)
    report = index_tiny(run, docs)
    assert report["indexed"] == [r"caf\xe9.txt", r"d\xff/deep.txt", "marked.txt", "wide.txt"]
    assert report["skipped"] == {
        r"caf\xe9.txt (another)": "its name is shown like another file's; rename it",
        "latin.txt": "not UTF-8 text; save it as UTF-8",
        "unmarked.txt": "looks like UTF-16 without a byte order mark; save it as UTF-8",
    }
    assert index_tiny(run, docs)["indexed"] == []
    (docs / os.fsdecode(b"d\xff")).rename(other := Path(os.fsdecode(b"other\xe9")))
    assert index_tiny(run, other)["indexed"] == ["deep.txt"]
    page = Path("page.html")
    answer = run("ask", os.fsdecode(b"When, caf\xe9?"), "--max-new-tokens", 2, "--html", page, "--json")
    assert {chunk["status"] for chunk in answer["report"]["chunks"]} == {"hit"}
    assert "When, caf\ufffd?" in page.read_text("utf-8")
    run("index", docs)  # printed, too


def test_a_database_whose_path_is_no_utf8_is_refused_before_a_model_is_loaded(fails: Run, docs: Path) -> None:
    message = fails("index", docs, "--db", os.fsdecode(b"db\xe9"), "--model", "nowhere")
    assert "its path is not UTF-8; name another" in message


def test_a_lead_in_in_utf16(run: Run, fails: Run, docs: Path, tmp_path: Path) -> None:
    file = tmp_path / "lead.txt"
    file.write_text("Words of the collection.", encoding="utf-16")
    index_tiny(run, docs, "--lead-in", file)
    assert json.loads(Path(".prophetkv/prophetkv-rag.json").read_text())["lead_in"] == "Words of the collection."
    file.write_bytes(b"\xe9")
    assert "cannot be read as text (not UTF-8 text; save it as UTF-8)" in fails("index", docs, "--lead-in", file)
