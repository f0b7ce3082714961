"""What is missing on this machine is told before anything is downloaded for it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from prophetkv_rag.cli.app import main
from prophetkv_rag.cli.database_settings import DatabaseSettings, save_settings
from prophetkv_rag.evaluation.tasks.ruler.words import word_lists

COMMANDS = {
    "index": ("index", "docs", "--db", "db"),
    "ask": ("ask", "Who?", "--db", "db"),
    "ask with another model": ("ask", "Who?", "--db", "db", "--model", "some/model"),
    "cache warm": ("cache", "warm", "--db", "db"),
    "serve": ("serve", "--db", "db", "--port", "0"),
    "demo": ("demo",),
}
WITH_DATABASE = [name for name in COMMANDS if name not in ("index", "demo")]


@pytest.fixture(autouse=True)
def _nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fetcher in ("prophetkv_rag.defaults.fetch_default_model", "prophetkv_rag.defaults.fetch_embedding_model"):
        monkeypatch.setattr(fetcher, lambda *arguments: pytest.fail("a model was fetched"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kw: pytest.fail("the hub was asked"))
    monkeypatch.setenv("PROPHETKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    Path("docs/one.txt").write_text("The lighthouse was built in 1862.")


def refusal(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(COMMANDS[command]) == 2
    return capsys.readouterr().err


def make_database(**settings: str) -> None:
    save_settings(Path("db"), replace(DatabaseSettings("some/model", 256), **settings))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_framework(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if command in WITH_DATABASE:
        make_database()
    monkeypatch.setitem(sys.modules, "llama_index.core", None)
    assert "pip install 'prophetkv-rag[llama-index]'" in refusal(command, capsys)


@pytest.mark.parametrize("command", ["index", *WITH_DATABASE])
def test_a_missing_package_of_the_remote_tier(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_database(remote="s3://bucket/caches")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert "the remote tier s3:// cannot be used" in refusal(command, capsys)


def test_a_remote_tier_of_a_server_without_a_database(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert main(["serve", "--cache-dir", "caches", "--remote", "memory://caches", "--port", "0"]) == 2
    assert "pip install 'prophetkv-rag[remote]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["index", *WITH_DATABASE])
def test_a_key_that_is_not_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_database(key_file=str(Path("gone").absolute()))
    assert "cannot read the key file" in refusal(command, capsys)


@pytest.mark.parametrize(
    ("task", "package"),
    [("ruler_niah_multikey_1", "wonderwords"), ("longbench_gov_report_e", "rouge"), ("longbench_vcsum", "jieba")],
)
def test_a_package_that_a_measured_task_needs(
    task: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    word_lists.cache_clear()
    assert main(["bench", "quality", "--task", task, "--model", "some/model"]) == 2
    assert f"{package!r}, which is not installed: pip install 'prophetkv-rag[bench]'" in capsys.readouterr().err


def test_a_source_text_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task", "ruler_qa_1", "--squad", "gone.json", "--model", "some/model"]
    assert main(["bench", "quality", *arguments]) == 2
    assert "gone.json" in capsys.readouterr().err


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    make_database()
    assert main(["ask", "Who?", "--db", "db", "--strategy", "magic"]) == 2
    assert "'magic'; allowed: " in capsys.readouterr().err
    assert main(["index", "docs", "--cache-limit", "much"]) == 2
    assert "'much' is no size" in capsys.readouterr().err
