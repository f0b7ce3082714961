"""A bounded part of the random kills of whole commands; `kill_commands.run(200, 1)` does as many as one likes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_commands_killed_at_random_points() -> None:
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); from tests.cli.kill_commands import run; "
        "print(sum(n for name, n in run(4, 3).items() if 'killed' in name))"
    )
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "4"
