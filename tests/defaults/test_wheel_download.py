"""Which installer fetches, with whose settings: pip, uv, and the pip of Python itself. Real ones, all on loopback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.defaults.fetcher import MakeFetcher
from tests.defaults.registry import Registry

NO_VENV = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name == "venv":
            raise ModuleNotFoundError("No module named 'venv'", name=name)
sys.meta_path.insert(0, Gone())
"""


# ---- pip ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["index", "extra index", "find-links", "configuration file"])
def test_pip_asks_the_registry_that_the_user_configured(
    way: str, registry: Registry, empty_registry: Registry, fetcher: MakeFetcher, tmp_path: Path
) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(f"[global]\nindex-url = {registry.url}\n")
    made = fetcher(
        **{
            "index": {"PIP_INDEX_URL": registry.url},
            "extra index": {"PIP_INDEX_URL": empty_registry.url, "PIP_EXTRA_INDEX_URL": registry.url},
            "find-links": {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": f"{registry.url}tinymodel/"},
            "configuration file": {"PIP_CONFIG_FILE": str(file)},
        }[way]
    )
    if way == "configuration file":  # the environment goes before files
        del made.settings["PIP_INDEX_URL"]
    assert made.fetch() == ""
    assert made.is_fetched()
    assert registry.served == 1


def test_the_environments_own_pip_goes_first_then_uv(
    registry: Registry, empty_registry: Registry, fetcher: MakeFetcher, uv_folder: str
) -> None:
    made = fetcher(PATH=uv_folder, PIP_INDEX_URL=registry.url, UV_DEFAULT_INDEX=empty_registry.url)
    assert made.fetch() == ""
    assert empty_registry.asked == []
    made = fetcher(PATH=uv_folder, PIP_INDEX_URL=empty_registry.url, UV_DEFAULT_INDEX=registry.url)
    made.target = made.target.with_name("second")
    assert made.fetch() == ""
    assert empty_registry.asked == ["/simple/tinymodel/"]
    assert registry.served == 2


def test_passwords_come_from_netrc(fetcher: MakeFetcher, bare_python: Path, uv_folder: str) -> None:
    registry = Registry(login="me:secret")
    for number, settings in enumerate(({"PIP_INDEX_URL": registry.url}, {"UV_DEFAULT_INDEX": registry.url})):
        made = fetcher(bare_python if number else sys.executable, PATH=uv_folder if number else "", **settings)
        made.target = made.target.with_name(f"tiny-{number}")
        (Path(made.settings["HOME"]) / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
        (Path(made.settings["HOME"]) / ".netrc").chmod(0o600)
        assert made.fetch() == ""
    registry.close()
    assert registry.served >= 2


# ---- no pip in the environment --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_FIND_LINKS", "uv.toml"])
def test_without_pip_uv_asks_the_registry_that_the_user_configured(
    variable: str,
    registry: Registry,
    empty_registry: Registry,
    fetcher: MakeFetcher,
    bare_python: Path,
    uv_folder: str,
    tmp_path: Path,
) -> None:
    made = fetcher(bare_python, PATH=uv_folder)
    if variable in ("UV_INDEX_URL", "uv.toml"):
        del made.settings["UV_DEFAULT_INDEX"]
    if variable == "uv.toml":
        file = tmp_path / "uv.toml"
        file.write_text(f'[[index]]\nurl = "{registry.url}"\ndefault = true\n')
        made.settings["UV_CONFIG_FILE"] = str(file)
    elif variable == "UV_FIND_LINKS":
        made.settings |= {"UV_DEFAULT_INDEX": empty_registry.url, variable: f"{registry.url}tinymodel/"}
    else:
        made.settings[variable] = registry.url
    made.settings["UV_SYSTEM_PYTHON"] = "1"  # as many container images set it; it must not choose another Python
    assert made.fetch() == ""
    assert made.is_fetched()
    assert registry.served >= 1


def test_the_uv_that_runs_us_is_found_where_it_says(
    registry: Registry, fetcher: MakeFetcher, bare_python: Path, uv_folder: str
) -> None:
    made = fetcher(bare_python, UV=str(Path(uv_folder) / "uv"), UV_DEFAULT_INDEX=registry.url)
    assert made.fetch() == ""
    assert made.is_fetched()


def test_with_neither_python_lends_its_pip_with_the_settings_of_the_environment(
    registry: Registry, fetcher: MakeFetcher, bare_python: Path
) -> None:
    made = fetcher(bare_python)
    del made.settings["PIP_INDEX_URL"]
    file = bare_python.parent.parent / "pip.conf"
    file.write_text(f"[global]\nindex-url = {registry.url}\n")
    try:
        assert made.fetch() == ""
    finally:
        file.unlink()
    assert made.is_fetched()
    assert registry.served == 1
    assert list(bare_python.parent.parent.glob("lib/*/site-packages/pip")) == []


def test_with_no_installer_at_all_it_says_how_to_get_one(fetcher: MakeFetcher, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    [packages] = (tmp_path / "bare").glob("lib/*/site-packages")
    (packages / "sitecustomize.py").write_text(NO_VENV)
    made = fetcher(tmp_path / "bare" / "bin" / "python")
    said = made.fetch()
    assert said.startswith("cannot download tinymodel==1.0: this environment has no pip, uv is not on PATH, Python ")
    assert "No module named 'venv'" in said
    assert "python -m ensurepip, or uv pip install pip" in said
    assert "PROPHETKV_CACHE_DIR" in said
    assert "registry" not in said
    assert not made.is_fetched()
