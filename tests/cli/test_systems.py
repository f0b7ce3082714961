"""Systems that the program cannot run on: one line that says why and what to do, status 2, and nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prophetkv_rag.cli.database_settings import DatabaseSettings, save_settings

NO_HOME = """
import pwd
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
"""
OLD_SQLITE = """
import sqlite3
sqlite3.sqlite_version_info, sqlite3.sqlite_version = {version}, ".".join(map(str, {version}))
"""
COMMANDS = {
    "index": ["index", "docs", "--db", "db", "--model", "docs"],
    "ask": ["ask", "where?", "--db", "made"],
    "serve": ["serve", "--db", "made", "--port", "0"],
    "demo": ["demo"],
    "doctor": ["doctor", "some/model"],
}


def refused(site: str, tmp_path: Path, *arguments: str, **variables: str) -> str:
    """Run the program where Python starts with `site`; returns the one line that it ends with."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(site)
    work = tmp_path / "work"
    (work / "docs").mkdir(parents=True)
    (work / "docs" / "one.txt").write_text("Something to read.")
    save_settings(work / "made", DatabaseSettings("some/model", 256))
    before = sorted(work.rglob("*"))
    left_out = ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "PROPHETKV_CACHE_DIR", "HF_HOME", "HF_HUB_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    run = subprocess.run(
        [sys.executable, "-P", "-m", "prophetkv_rag.cli.app", *arguments],
        cwd=work,
        env=kept | {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert sorted(work.rglob("*")) == before
    return run.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["index", "serve", "demo", "doctor"])
def test_no_home_directory(command: str, tmp_path: Path) -> None:
    said = refused(NO_HOME, tmp_path, *COMMANDS[command])
    assert "needs a home directory and there is none" in said
    assert "set HOME to a directory that can be written to" in said


@pytest.mark.parametrize("command", ["index", "ask"])
def test_an_sqlite_that_is_too_old_for_chroma(command: str, tmp_path: Path) -> None:
    site = OLD_SQLITE.format(version=(3, 31, 1))
    said = refused(site, tmp_path, *COMMANDS[command], HOME=str(tmp_path))
    assert "Chroma does not run with this Python, whose SQLite is 3.31.1" in said
    assert "\x1b" not in said
    assert "A newer Python" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_output_that_cannot_be_written(tiny_model: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-P", "-m", "prophetkv_rag.cli.app", "doctor", str(tiny_model)],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert run.returncode == 2
    assert "prophetkv-rag: error: No space left on device" in run.stderr
    assert "Traceback" not in run.stderr
