"""Ctrl-C, wherever it meets a command: one line, status 130, nothing half-written, and the next run completes it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prophetkv_rag.defaults.wheel_fetch import write_source
from tests.tiny import save_tiny, save_tiny_encoder, text_of

PROGRAM = """
import os, signal, sys
event, part, *arguments = sys.argv[1:]
sent = False
def interrupt(name, values):
    global sent
    if not sent and name == event and any(part in str(value) for value in values):
        sent = True
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
sys.argv[1:] = arguments
from prophetkv_rag.cli.app import main
sys.exit(main())
"""
# Where the signal comes: an event that Python announces, and a part of what is announced.
WHERE = {
    "while torch is imported": ("import", "torch.nn.functional"),
    "while the model is loaded": ("open", "tokenizer.json"),
    "when the catalog is opened": ("sqlite3.connect", "catalog.sqlite"),
    "before the settings are renamed": ("os.rename", "prophetkv-rag.json"),
    "before a cache is written": ("open", ".safetensors."),
    "before a cache is renamed": ("os.rename", ".safetensors"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interrupt")
    encoder = path / "cache" / "models" / "all-MiniLM-L6-v2"
    shutil.copytree(save_tiny_encoder(path / "encoder"), encoder)
    write_source(encoder, "a test")
    save_tiny(path / "model")
    (path / "docs").mkdir()
    for seed in range(4):
        (path / "docs" / f"{seed}.txt").write_text(text_of(120, seed=seed))
    return path


def run(place: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        cwd=place,
        env=os.environ | {"PROPHETKV_CACHE_DIR": str(place / "cache"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def index(place: Path, database: Path) -> list[object]:
    return ["index", "docs", "--db", database, "--model", place / "model", "--chunk-size", 64]


def test_indexing(place: Path, tmp_path: Path) -> None:
    """Again and again in one database, which the first run that nothing stops completes."""
    database = tmp_path / "db"
    for where in WHERE.values():
        stopped = run(place, PROGRAM, *where, *index(place, database))
        assert stopped.stderr.splitlines()[-1] == "prophetkv-rag: error: interrupted", where
        assert "Traceback" not in stopped.stderr
        assert "Exception ignored" not in stopped.stderr
        assert stopped.returncode == 130
        names = [path.name for path in tmp_path.rglob("*")]
        assert [name for name in names if name.endswith((".tmp", ".new")) or ".settings" in name] == []
    again = run(place, PROGRAM, "none", "none", *index(place, database))
    assert again.returncode == 0, again.stderr
    verified = run(place, PROGRAM, "none", "none", "cache", "verify", "--db", database)
    assert "0 faults found" in verified.stdout


def test_another_command(place: Path) -> None:
    stopped = run(place, PROGRAM, *WHERE["while torch is imported"], "doctor", place / "model")
    assert (stopped.returncode, stopped.stdout) == (130, "")
    assert stopped.stderr.splitlines()[-1] == "prophetkv-rag: error: interrupted"
    assert "Traceback" not in stopped.stderr


def test_a_second_one_ends_it_at_once(place: Path) -> None:
    """While threads are waited for at the end, say: without a traceback, and a shell sees status 130 all the same."""
    ending = PROGRAM.replace("sys.exit(main())", "status = main(); os.kill(os.getpid(), signal.SIGINT); sys.exit(7)")
    stopped = run(place, ending, *WHERE["while the model is loaded"], "doctor", place / "model")
    assert stopped.returncode == -signal.SIGINT
    assert stopped.stderr.splitlines()[-1] == "prophetkv-rag: error: interrupted"


def test_fetching_the_models(place: Path) -> None:
    code = PROGRAM.replace("from prophetkv_rag.cli.app import main", "from prophetkv_rag.defaults.__main__ import main")
    stopped = run(place, code, "import", "huggingface_hub")
    assert stopped.returncode == 130
    assert stopped.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stopped.stderr
