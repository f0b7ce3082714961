"""The README's quickstart is the example in `examples/`, and it runs as printed (on a tiny model, offline)."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.integrations.rag import HashingEmbedding
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "quickstart.py"


def quickstart() -> str:
    """The python block after `<!-- quickstart -->` in the README."""
    found = re.search(r"<!-- quickstart -->\s*```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert found, "README.md has no python block after <!-- quickstart -->"
    return found[1]


@pytest.fixture
def tiny_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that the quickstart imports, bound to models that need no download."""
    model = save_tiny(tmp_path / "model")
    monkeypatch.setattr("prophetkv_rag.defaults.fetch_default_model", lambda: model)
    monkeypatch.setattr("prophetkv_rag.integrations.llama_index.MiniLMEmbedding", HashingEmbedding)


def test_readme_and_example_are_the_same_code() -> None:
    code = EXAMPLE.read_text("utf-8").split('"""\n\n', 1)[1]
    assert quickstart().strip() == code.strip()


@pytest.mark.usefixtures("tiny_default_model")
def test_quickstart_runs_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "quickstart.py"
    script.write_text(quickstart(), "utf-8")
    runpy.run_path(str(script))
    answer, report = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert answer.strip()
    assert "2/2 chunks from cache" in report
