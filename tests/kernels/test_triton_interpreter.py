"""Runs the kernels' tests in Triton's interpreter, which must be chosen before Triton is loaded: hence processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def run_pytest(name: str, **environment: str) -> str:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{name}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "at_least"), [("triton_cases.py", 75), ("triton_memory.py", 28), ("triton_engine.py", 9)]
)
def test_in_the_interpreter(name, at_least):
    output = run_pytest(name, TRITON_INTERPRET="1", TRITON_DEFAULT_FP_FUSION="1", OMP_NUM_THREADS="1")
    assert int(re.search(r"(\d+) passed", output)[1]) >= at_least
    assert "skipped" not in output
