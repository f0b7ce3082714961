"""The program itself: version, help, JSON, exit statuses, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prophetkv_rag import __version__
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
