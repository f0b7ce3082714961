"""The LangChain examples run as they lie there, on tiny models, and the docs' quickstart is one of them."""

from __future__ import annotations

import io
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.integrations.langchain.rag import HashingEmbeddings, own_collection
from tests.tiny import save_tiny, text_of

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The names that the examples import, bound to models that need no download."""
    model = save_tiny(tmp_path / "model")
    monkeypatch.setattr("prophetkv_rag.defaults.fetch_default_model", lambda: model)
    monkeypatch.setattr("prophetkv_rag.integrations.langchain.MiniLMEmbeddings", HashingEmbeddings)
    return model


def test_the_docs_quickstart_is_the_example() -> None:
    docs = (ROOT / "docs" / "langchain.md").read_text("utf-8")
    found = re.search(r"<!-- langchain-quickstart -->\s*```python\n(.*?)```", docs, re.DOTALL)
    assert found, "docs/langchain.md has no python block after <!-- langchain-quickstart -->"
    assert found[1].strip() == (EXAMPLES / "langchain_rag.py").read_text("utf-8").split('"""\n\n', 1)[1].strip()


@pytest.mark.usefixtures("tiny_model")
def test_langchain_rag(capsys: pytest.CaptureFixture[str]) -> None:
    with own_collection():
        runpy.run_path(str(EXAMPLES / "langchain_rag.py"))
    assert "2/2 chunks from cache" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_model")
def test_langgraph_agent(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "langgraph_agent.py"))
    reused = re.findall(r"'cache_read': (\d+)", capsys.readouterr().out)
    assert len(reused) == 2
    assert all(int(tokens) > 0 for tokens in reused)


def test_the_terminal_chat(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text(text_of(60, seed=1), "utf-8")
    (folder / "b.md").write_text(text_of(60, seed=2), "utf-8")

    def chat(questions: str) -> str:
        monkeypatch.setattr(sys, "argv", ["chat.py", str(folder), str(tiny_model)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
        runpy.run_path(str(EXAMPLES / "chatbot_langchain" / "chat.py"), run_name="__main__")
        return " ".join(capsys.readouterr().out.split())

    first = chat("What is passage 1?\nAnd passage 2?\n\n")
    assert "'num_added': 2" in first
    reused = [int(tokens) for tokens in re.findall(r"(\d+) of \d+ prompt tokens reused", first)]
    assert len(reused) == 2
    assert all(tokens > 50 for tokens in reused)
    assert "a.txt" in first
    (folder / "b.md").unlink()
    second = chat("Why?\n")
    assert re.search(r"'num_added': 0.*'num_skipped': 1.*'num_deleted': 1", second)
    assert "b.md" not in second.split("Ask away")[1]


def test_the_terminal_chat_says_how_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["chat.py"])
    with pytest.raises(SystemExit, match=r"usage: chat.py FOLDER"):
        runpy.run_path(str(EXAMPLES / "chatbot_langchain" / "chat.py"), run_name="__main__")
