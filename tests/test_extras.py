"""Without an extra, whatever needs it says which one to install; other packages' faults are told as they are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from prophetkv_rag.errors import InputError, MissingExtraError
from prophetkv_rag.extras import needs

ROOT = Path(__file__).resolve().parents[1]

LOAD_GGUF = "from prophetkv_rag.model import load_model; load_model('model.gguf')"
WORD_LISTS = "from prophetkv_rag.evaluation.tasks.ruler.words import word_lists; word_lists()"

# (what is called, the packages that are not installed, the extra it names)
CALLS = {
    "llama_index": ("import prophetkv_rag.integrations.llama_index", ["llama_index"], "llama-index"),
    "its module": (
        "import prophetkv_rag.integrations.llama_index.llm",
        ["llama_index"],
        "llama-index",
    ),
    "its vector store": (
        "import prophetkv_rag.integrations.llama_index",
        ["llama_index.vector_stores"],
        "llama-index",
    ),
    "langchain": ("import prophetkv_rag.integrations.langchain", ["langchain_core"], "langchain"),
    "langchain's Chroma": ("import prophetkv_rag.integrations.langchain", ["langchain_chroma"], "langchain"),
    "langchain's agents": (
        "from prophetkv_rag.integrations.langchain import RetrievalMiddleware",
        ["langchain"],
        "agents",
    ),
    "server": ("from prophetkv_rag.server import create_app", ["fastapi"], "server"),
    "server.app": ("import prophetkv_rag.server.app", ["prometheus_client"], "server"),
    "remote": (
        "from prophetkv_rag.store.disk import open_disk_store; open_disk_store('x', remote='file:///y')",
        ["fsspec"],
        "remote",
    ),
    "encryption": (
        "from prophetkv_rag.store.encryption import load_key; load_key(bytes(32))",
        ["cryptography"],
        "encryption",
    ),
    "structured": (
        "from prophetkv_rag.generation import Grammar, GrammarCompiler; "
        "GrammarCompiler(None, ()).start(Grammar.json_object())",
        ["llguidance"],
        "structured",
    ),
    "gguf": (LOAD_GGUF, ["gguf"], "gguf"),
    "gguf's accelerate": (
        LOAD_GGUF,
        ["accelerate"],
        "gguf",
    ),
    "plots": ("from prophetkv_rag.evaluation.plotting import load_pyplot; load_pyplot()", ["matplotlib"], "bench"),
    "words": (
        WORD_LISTS,
        ["wonderwords"],
        "bench",
    ),
    "rouge": (
        "from prophetkv_rag.evaluation.quality.metrics import METRICS; METRICS['rouge_l']('a b', ['a'])",
        ["rouge"],
        "bench",
    ),
}

PROGRAM = """
import sys, json
class Gone:
    missing = []
    def find_spec(self, name, path=None, target=None):
        if any(name == gone or name.startswith(gone + ".") for gone in self.missing):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
said = {}
for label, (code, missing, _) in json.loads(sys.argv[1]).items():
    loaded = set(sys.modules)
    Gone.missing = missing
    for name in list(sys.modules):
        if name.startswith(("prophetkv_rag.integrations", "prophetkv_rag.server", *missing)):
            del sys.modules[name]
    try:
        exec(code)
    except ImportError as error:
        said[label] = [type(error).__name__, str(error)]
json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    run = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, json.dumps(CALLS)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )
    answer: dict[str, list[str]] = json.loads(run.stdout)
    return answer


@pytest.mark.parametrize("label", CALLS)
def test_whoever_lacks_an_extra_learns_its_name(label: str, said: dict[str, list[str]]) -> None:
    _, missing, extra = CALLS[label]
    kind, message = said[label]
    assert kind == "MissingExtraError"
    assert f"pip install 'prophetkv-rag[{extra}]'" in message
    assert missing[0] in message


def test_every_extra_that_is_named_exists() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for folder in ("prophetkv_rag", "integrations", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text("utf-8")
            named = [*re.findall(r'needs\(\s*"([a-z-]+)"', text), *re.findall(r"prophetkv[-_]rag\[([a-z,-]+)\]", text)]
            assert [name for part in named for name in part.split(",") if name not in known] == [], path


def test_it_is_an_error_of_both_kinds() -> None:
    """Programs catch `ImportError`, the command line its own errors."""
    with pytest.raises(MissingExtraError) as caught, needs("bench", "no_such_package", what="this"):
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, InputError)
    assert caught.value.name == "no_such_package"


def test_what_is_missing_inside_an_installed_package_is_not_ours_to_explain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "framework").mkdir()
    (tmp_path / "framework" / "__init__.py").write_text("import what_it_needs")
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as caught, needs("bench", "framework", what="this"):
        import framework  # type: ignore[import-not-found]  # noqa: F401
    assert not isinstance(caught.value, MissingExtraError)
    assert caught.value.name == "what_it_needs"
    with pytest.raises(ModuleNotFoundError) as caught, needs("bench", "older", what="this"):
        import older.newer  # type: ignore[import-not-found]  # noqa: F401
    assert not isinstance(caught.value, MissingExtraError)
