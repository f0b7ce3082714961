"""The program on a tiny random model, with no hub and an empty working directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag.cli.app import main
from tests.cli.program import Run
from tests.tiny import save_tiny, save_tiny_encoder, text_of


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def no_hub(self: object, repo_id: str, **options: object) -> None:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    msg = "no network"
    raise ConnectionError(msg)


@pytest.fixture
def offline(tiny_model: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default models are the tiny ones, the hub does not answer, and the working directory is empty."""
    monkeypatch.setattr("prophetkv_rag.defaults.fetch_default_model", lambda progress: tiny_model)
    for name in ("defaults", "defaults.embedding"):
        monkeypatch.setattr(f"prophetkv_rag.{name}.fetch_embedding_model", lambda progress=None: tiny_encoder)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_hub)
    monkeypatch.setenv("PROPHETKV_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def docs() -> Path:
    directory = Path("docs")
    (directory / "deep").mkdir(parents=True)
    (directory / "one.txt").write_text(text_of(150, seed=1))
    (directory / "deep" / "two.md").write_text(text_of(100, seed=2) + "\r\nÜnïcode 日本 <|im_end|>")
    return directory


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the program and returns what it printed on standard output, as JSON if that was asked for."""

    def program(*arguments: object, status: int = 0) -> Any:
        returned = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert returned == status, output.err
        return json.loads(output.out) if "--json" in arguments else output.out

    return program


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the program, which must end with status 2 and one line of error, and returns that line."""

    def program(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        lines = [line for line in output.err.splitlines() if "error" in line]
        assert len(lines) == 1, output.err
        assert "Traceback" not in output.err
        return lines[0]

    return program
