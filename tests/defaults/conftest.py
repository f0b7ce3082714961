"""Registries on loopback, and environments with and without pip and uv that fetch from them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.defaults.fetcher import Fetcher, MakeFetcher
from tests.defaults.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
NOWHERE = "http://127.0.0.1:9/simple/"  # the discard port: nobody listens


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry()
    yield made
    made.close()


@pytest.fixture
def empty_registry() -> Iterator[Registry]:
    made = Registry(has_wheel=False)
    yield made
    made.close()


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment without pip, as `uv venv` makes them."""
    directory = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode != 0
    return python


@pytest.fixture(scope="session")
def uv_folder() -> str:
    return str(Path(pytest.importorskip("uv").find_uv_bin()).parent)


@pytest.fixture
def fetcher(tmp_path: Path) -> MakeFetcher:
    def make(python: Path | str = sys.executable, **settings: str) -> Fetcher:
        (tmp_path / "home").mkdir(exist_ok=True)
        defaults = {
            "HOME": str(tmp_path / "home"),
            "PATH": "",
            "PYTHONPATH": str(ROOT),
            "PIP_INDEX_URL": NOWHERE,
            "PIP_RETRIES": "0",
            "UV_DEFAULT_INDEX": NOWHERE,
            "UV_HTTP_RETRIES": "0",
            "UV_CACHE_DIR": str(tmp_path / "uv-cache"),
        }
        return Fetcher(Path(python), tmp_path / "models" / "tiny", defaults | settings)

    return make
