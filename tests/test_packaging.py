"""The package as users get it: built from the sdist, installed, imported away from the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAPPED = {
    "prophetkv_rag": "prophetkv_rag",
    "kernels": "prophetkv_rag/kernels",
    "integrations": "prophetkv_rag/integrations",
}
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


def expected_files() -> set[str]:
    """Every module and data file, by its place in an installation."""
    files = set()
    for folder, place in MAPPED.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files.add(f"{place}/{path.relative_to(ROOT / folder).as_posix()}")
    return files


def build(kind: str, source: Path, target: Path) -> Path:
    target.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(target)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return target / result.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an unpacked sdist, which was built from a copy of the sources."""
    directory = tmp_path_factory.mktemp("build")
    source = directory / "source"
    for name in (*MAPPED, "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    sdist = build("sdist", source, directory / "sdist")
    shutil.unpack_archive(sdist, directory / "unpacked", filter="data")
    [unpacked] = (directory / "unpacked").iterdir()
    return build("wheel", unpacked, directory / "wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the installed wheel, without dependencies."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return target


def run_away_from_the_repository(code: str, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code with the installed wheel, first on the path, in another folder."""
    head = f"import sys; sys.path.insert(0, {str(site)!r}); "
    return subprocess.run([sys.executable, "-c", head + code], cwd=cwd, capture_output=True, text=True, check=False)


def test_the_package_list_names_every_package() -> None:
    folders = {
        ".".join((MAPPED[top].replace("/", "."), *path.parent.relative_to(ROOT / top).parts))
        for top in MAPPED
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert sorted(SETTINGS["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_the_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected_files()


def test_the_wheel_has_licence_and_program(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "Apache License" in archive.read(names["licenses/LICENSE"]).decode()
    assert "prophetkv-rag = prophetkv_rag.cli.app:main" in archive.read(names["entry_points.txt"]).decode()


def test_every_module_is_found_under_our_name(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, prophetkv_rag; print(prophetkv_rag.__file__); "
        "[print(u.find_spec('prophetkv_rag.' + name).origin) for name in ('kernels', 'cli.app', 'engine')]"
    )
    result = run_away_from_the_repository(code, installed, tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split()
    assert len(lines) == 4
    assert all(line.startswith(str(installed)) for line in lines)


@pytest.mark.parametrize("name", ["kernels", "integrations"])
def test_bare_names_do_not_exist_outside_the_repository(name: str, installed: Path, tmp_path: Path) -> None:
    result = run_away_from_the_repository(f"import {name}", installed, tmp_path)
    assert f"No module named '{name}'" in result.stderr


def test_versions_agree() -> None:
    from prophetkv_rag import __version__

    assert SETTINGS["project"]["version"] == __version__


def test_pins_satisfy_the_declared_ranges() -> None:
    """constraints.txt is what CI and the demo install; every direct dependency is pinned there, inside its range."""
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    extras = SETTINGS["project"]["optional-dependencies"]
    declared = [*SETTINGS["project"]["dependencies"], *SETTINGS["dependency-groups"]["dev"]]
    declared += [
        entry for name in ("llama-index", "langchain", "gguf", "app", "remote", "bench") for entry in extras[name]
    ]
    for requirement in map(Requirement, declared):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
