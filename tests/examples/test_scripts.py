"""The scripts that a reader copies run as they are: on a tiny model, and one of them on the real one."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_index.core
import pytest
from llama_index.core import Settings

from prophetkv_rag.defaults import fetch_default_model
from tests.integrations.rag import TEXTS, HashingEmbedding
from tests.tiny import save_tiny

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SETTINGS = ("_llm", "_embed_model", "_node_parser", "_prompt_helper", "_chat_prompt_helper", "_transformations")


@pytest.fixture
def tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model")
    monkeypatch.setattr("prophetkv_rag.defaults.fetch_default_model", lambda: model)
    monkeypatch.setattr("prophetkv_rag.integrations.llama_index.MiniLMEmbedding", HashingEmbedding)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """LlamaIndex's global settings as they were."""
    kept = {name: getattr(Settings, name) for name in SETTINGS}
    tokenizer = llama_index.core.global_tokenizer
    for name in SETTINGS:
        setattr(Settings, name, None)
    yield
    for name, value in kept.items():
        setattr(Settings, name, value)
    llama_index.core.global_tokenizer = tokenizer


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def script(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


@pytest.mark.usefixtures("tiny_models")
def test_transformers_only(run: Any) -> None:
    assert "2/2 chunks from cache" in run("transformers_only.py")


@pytest.mark.usefixtures("tiny_models")
def test_llama_index_rag_keeps_a_folder_in_step(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, "utf-8")
    first = run("llama_index_rag.py", str(folder), "When does the museum open?")
    assert "4 files; 4 chunks are new, 4 are cached" in first
    assert "1.txt" in first
    assert "3/3 chunks from cache" in first

    again = run("llama_index_rag.py", str(folder), "When does the museum open?", "And the library?")
    assert "4 files; 0 chunks are new, 4 are cached" in again
    assert again.count("3/3 chunks from cache") == 2

    (folder / "0.txt").unlink()
    (folder / "1.txt").write_text("The museum is closed for good, says the sign at its old door.", "utf-8")
    changed = run("llama_index_rag.py", str(folder), "When does the museum open?")
    assert "3 files; 1 chunks are new, 3 are cached" in changed


@pytest.mark.model
def test_on_the_real_model(run: Any) -> None:
    fetch_default_model()
    answer = run("transformers_only.py")
    assert "40,000" in answer or "forty thousand" in answer
