"""The script that is to be run on a GPU, run on a CPU: the same way, with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_dry_run_goes_all_the_way(tmp_path):
    script = ROOT / "benchmarks" / "gpu_check" / "run.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "--dry-run"], capture_output=True, text=True, check=False
    )
    outputs = {path.name: path.read_text()[-2000:] for path in tmp_path.glob("*.txt")}
    assert done.returncode == 0, (done.stdout, done.stderr, outputs)
    steps = json.loads((tmp_path / "summary.json").read_text())
    assert [step["step"] for step in steps] == ["gpu-tests", "kernels", "ttft"]
    rows = [json.loads(line) for line in outputs["ttft.txt"].splitlines() if line.startswith("{")]
    exact = [row["logits_off_by"] for row in rows if row.get("recompute_ratio") == 1.0]
    assert len(exact) == 2
    assert max(exact) < 1e-3
