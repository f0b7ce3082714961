"""The three distributions as they are released: built, checked, looked into, installed and imported; no network."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.test_public_api import PUBLIC

ROOT = Path(__file__).resolve().parents[1]
PACKAGING = ROOT / "packaging"
NAMES = {  # distribution -> (module, what it hands on)
    "langchain-prophetkv": ("langchain_prophetkv", "prophetkv_rag.integrations.langchain"),
    "llama-index-llms-prophetkv": ("llama_index.llms.prophetkv", "prophetkv_rag.integrations.llama_index"),
}
OURS = ("prophetkv_rag", "kernels", "integrations", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
BIG = 300_000
"""Bytes; the largest file that we ship is one of the demo's texts."""


def project(folder: Path) -> dict[str, object]:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and a wheel (built from that) of each, as the release workflow makes them."""
    directory = tmp_path_factory.mktemp("release")
    ours = directory / "prophetkv-rag"
    for name in OURS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, ours / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, ours / name)
    (ours / "tests").mkdir()
    (ours / "tests" / "test_something.py").write_text("")  # setuptools takes such files by itself
    sources = [ours]
    for name in NAMES:
        sources.append(directory / name)
        shutil.copytree(PACKAGING / name, sources[-1], ignore=shutil.ignore_patterns("__pycache__"))
    for source in sources:
        command = [
            sys.executable,
            "-P",
            "-m",
            "build",
            "--no-isolation",
            "--outdir",
            str(directory / "dist"),
            str(source),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return directory / "dist"


def files_of(path: Path) -> dict[str, int]:
    """Name -> bytes of what an archive holds, an sdist's without its own folder."""
    if path.suffix == ".whl":
        return {info.filename: info.file_size for info in zipfile.ZipFile(path).infolist()}
    with tarfile.open(path) as archive:
        return {info.name.partition("/")[2]: info.size for info in archive.getmembers() if info.isfile()}


def test_there_are_three_of_each_with_one_version(built: Path) -> None:
    version = project(ROOT)["version"]
    stems = [name.replace("-", "_") for name in ("prophetkv-rag", *NAMES)]
    expected = [f"{stem}-{version}{ending}" for stem in stems for ending in (".tar.gz", "-py3-none-any.whl")]
    assert sorted(path.name for path in built.iterdir()) == sorted(expected)


def test_twine_finds_nothing(built: Path) -> None:
    command = [sys.executable, "-P", "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("PASSED") == 6


def test_contents(built: Path) -> None:
    for path in built.iterdir():
        files = files_of(path)
        assert [name for name in files if "tests/" in name or "__pycache__" in name or "benchmarks" in name] == []
        assert {name: size for name, size in files.items() if size > BIG} == {}
        licences = [name for name in files if name.rpartition("/")[2] == "LICENSE"]
        assert len(licences) == 1, path.name
        assert files[licences[0]] == (ROOT / "LICENSE").stat().st_size


def test_thin_ones_hold_names_alone(built: Path) -> None:
    for name, (module, _) in NAMES.items():
        [wheel] = built.glob(f"{name.replace('-', '_')}-*.whl")
        files = {file for file in files_of(wheel) if ".dist-info/" not in file}
        folder = module.replace(".", "/")
        assert files == {f"{folder}/__init__.py", f"{folder}/py.typed"}
        metadata = next(file for file in files_of(wheel) if file.endswith("/METADATA"))
        text = zipfile.ZipFile(wheel).read(metadata).decode()
        assert re.search(
            r"^Requires-Dist: prophetkv-rag\[(langchain|llama-index)\]<0\.2,>=0\.1\.0$", text, re.MULTILINE
        )
        assert "License-Expression: Apache-2.0" in text


@pytest.mark.parametrize("name", NAMES)
def test_installed_it_hands_on_ours(built: Path, name: str, tmp_path: Path) -> None:
    module, ours = NAMES[name]
    target = tmp_path / "site"
    wheels = [str(next(built.glob(f"{stem}-*.whl"))) for stem in (name.replace("-", "_"), "prophetkv_rag")]
    command = [sys.executable, "-P", "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, *wheels], check=True, capture_output=True)
    code = f"""
import sys; sys.path.insert(0, {str(target)!r})
import importlib, {module} as thin
full = importlib.import_module({ours!r})
assert thin.__file__.startswith({str(target)!r}) and full.__file__.startswith({str(target)!r}), (thin, full)
assert set(thin.__all__) == set(full.__all__), set(thin.__all__) ^ set(full.__all__)
assert all(getattr(thin, name) is getattr(full, name) for name in full.__all__)
import llama_index.core, langchain_core  # a namespace that is shared stays whole
print("same", len(thin.__all__))
"""
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == f"same {len(PUBLIC[ours])}\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    path = PACKAGING / "langchain-prophetkv" / "langchain_prophetkv" / "__init__.py"
    spec = importlib.util.spec_from_file_location("langchain_prophetkv", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(AttributeError, match="no attribute 'Prophet'"):
        module.Prophet  # noqa: B018
    assert dir(module) == sorted(PUBLIC["prophetkv_rag.integrations.langchain"])


@pytest.mark.parametrize("name", NAMES)
def test_metadata_is_kept_in_step_with_ours(name: str) -> None:
    thin, ours = project(PACKAGING / name), project(ROOT)
    for field in ("version", "requires-python", "license", "classifiers"):
        assert thin[field] == ours[field], field
    major, minor, _ = str(ours["version"]).split(".")
    wanted = f">={ours['version']},<{major}.{int(minor) + 1}"
    extras: dict[str, list[str]] = thin["optional-dependencies"]  # type: ignore[assignment]
    requirements = [*thin["dependencies"], *itertools.chain(*extras.values())]  # type: ignore[misc]
    for requirement in requirements:
        extra = re.fullmatch(rf"prophetkv-rag\[([a-z-]+)\]{re.escape(wanted)}", requirement)
        assert extra, requirement
        assert extra[1] in ours["optional-dependencies"]  # type: ignore[operator]
