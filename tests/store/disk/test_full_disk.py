"""A disk that is full while chunks are indexed: a real one, a small file system in a mount namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ON_A_SMALL_DISK = 'mount -t tmpfs -o size="$1",mode=700 none "$2" && shift && shift && exec "$@"'


def namespace() -> list[str]:
    """The command that gives a process mounts of its own; skips the test where that is not allowed."""
    command = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1): a small file system cannot be mounted")
    tried = subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"a small file system cannot be mounted: {tried.stderr.decode().strip()}")
    return command


@pytest.mark.parametrize(
    ("what", "size", "printed"),
    [
        ("index", "2m", "one warning, same answers"),
        ("with_remote", "3m", "uploaded all the same"),
        ("command_line", "4m", "caches not kept"),
    ],
)
def test_a_full_disk_while_indexing(tmp_path: Path, what: str, size: str, printed: str) -> None:
    mounted = tmp_path / "prophetkv"
    mounted.mkdir()
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); "
        f"from tests.store.disk.full_disk import {what} as do; do(sys.argv[1])"
    )
    command = [*namespace(), "sh", "-c", ON_A_SMALL_DISK, "sh", size, str(mounted), sys.executable, "-P", "-c", code]
    result = subprocess.run([*command, str(mounted)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert printed in result.stdout
