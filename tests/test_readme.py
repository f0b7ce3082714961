"""The README's examples run as printed (on tiny models, offline); the quickstart is the one in `examples/`."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.integrations.langchain.rag import HashingEmbeddings, own_collection
from tests.integrations.rag import HashingEmbedding
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "quickstart.py"
BEFORE = (r"^from prophetkv_rag.defaults import .*?$", r"^texts = \[.*?^\]")  # what later examples take from the first


def block(name: str) -> str:
    """The python block after `<!-- name -->` in the README."""
    found = re.search(rf"<!-- {name} -->\s*```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert found, f"README.md has no python block after <!-- {name} -->"
    return found[1]


@pytest.fixture
def tiny_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that the quickstart imports, bound to models that need no download."""
    model = save_tiny(tmp_path / "model")
    monkeypatch.setattr("prophetkv_rag.defaults.fetch_default_model", lambda: model)
    monkeypatch.setattr("prophetkv_rag.integrations.llama_index.MiniLMEmbedding", HashingEmbedding)
    monkeypatch.setattr("prophetkv_rag.integrations.langchain.MiniLMEmbeddings", HashingEmbeddings)


def test_readme_and_example_are_the_same_code() -> None:
    code = EXAMPLE.read_text("utf-8").split('"""\n\n', 1)[1]
    assert block("quickstart").strip() == code.strip()


@pytest.mark.usefixtures("tiny_default_model")
def test_quickstart_runs_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "quickstart.py"
    script.write_text(block("quickstart"), "utf-8")
    runpy.run_path(str(script))
    answer, report = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert answer.strip()
    assert "2/2 chunks from cache" in report


@pytest.mark.usefixtures("tiny_default_model")
def test_the_langchain_example_runs_as_printed_behind_the_quickstart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imports, texts = (re.search(pattern, block("quickstart"), re.DOTALL | re.MULTILINE) for pattern in BEFORE)
    assert imports
    assert texts
    script = tmp_path / "langchain_example.py"
    script.write_text("\n".join([imports[0], texts[0], block("langchain")]), "utf-8")
    with own_collection():
        names = runpy.run_path(str(script))
    assert capsys.readouterr().out.strip()
    report = names["model"].last_report
    assert [chunk.status for chunk in report.chunks] == ["hit", "hit"]
