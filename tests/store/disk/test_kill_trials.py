"""A bounded part of the random kills; `kill_trials.run(200, 1)` does as many as one likes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_at_random_points_of_everything() -> None:
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); "
        "from tests.store.disk.kill_trials import run; print(run(16, 7).total())"
    )
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "16"
