"""What has to be seen on a GPU, in one command of at most 8 minutes; every step's output is kept as a file.

    python benchmarks/gpu_check/run.py OUT        from the repository's root, on a machine with one GPU

It needs, in the environment of that python: torch for the GPU, triton, this package (`pip install -e '.[all]'` or
PYTHONPATH as below) and pytest with its plug-ins (`pip install --group dev`). No network and no model: weights are
random, in the shape of Llama-3.1-8B (16 GB in bf16; 40 GB of GPU memory are enough). Without an installed package, the
two mapped folders are linked into a folder that is put on PYTHONPATH. vLLM's tests run where vLLM is installed. On a
CPU, `--dry-run` goes the same way with a tiny model; a test does that.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 480.0


def main() -> int:
    """Run the steps in order; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for the outputs; made if it is not there")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with a tiny model")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | _importable(args.out)
    started, results = time.monotonic(), []
    for name, command, limit in _steps(args.dry_run):
        left = LIMIT_S - (time.monotonic() - started)
        if left < 10:
            results.append({"step": name, "outcome": "left out: the time is up"})
            continue
        begun = time.monotonic()
        with (args.out / f"{name}.txt").open("w") as file:
            try:
                done = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, timeout=min(limit, left)
                )
                outcome = "passed" if done.returncode == 0 else f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {min(limit, left):.0f} s"
        results.append({"step": name, "outcome": outcome, "seconds": round(time.monotonic() - begun, 1)})
        print(json.dumps(results[-1]), flush=True)  # noqa: T201
    (args.out / "summary.json").write_text(json.dumps(results, indent=2))
    return int(any(result["outcome"] != "passed" for result in results))


def _steps(is_dry: bool) -> list[tuple[str, list[str], float]]:
    python = [sys.executable, "-P"]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    kernels = [*python, "-c", "from prophetkv_rag.cli.app import main; main()", "bench", "kernels"]
    ttft = [*python, str(ROOT / "benchmarks/gpu_check/ttft.py")]
    if is_dry:
        steps = [
            ("gpu-tests", [*pytest, "-m", "gpu", "--collect-only", "tests/kernels"], 120.0),
            ("kernels", [*kernels, "--help"], 60.0),
            ("ttft", [*ttft, "--tiny"], 120.0),
        ]
    else:
        steps = [
            ("gpu-tests", [*pytest, "-m", "gpu", "tests"], 150.0),
            ("kernels", kernels, 60.0),
            ("ttft", ttft, 180.0),
        ]
        if importlib.util.find_spec("vllm") is not None:
            steps.append(("vllm", [*pytest, "tests/vllm/test_models.py"], 200.0))
    return steps


def _importable(out: Path) -> dict[str, str]:
    """Make the package importable where it is not installed: as it would lie, by links."""
    if importlib.util.find_spec("prophetkv_rag.kernels.ops") is not None:
        return {}
    package = out / "links" / "prophetkv_rag"
    package.mkdir(parents=True, exist_ok=True)
    sources = [*(ROOT / "prophetkv_rag").iterdir(), ROOT / "kernels", ROOT / "integrations"]
    for source in sources:
        link = package / source.name
        if not link.is_symlink():
            link.symlink_to(source)
    return {"PYTHONPATH": str(package.parent)}


if __name__ == "__main__":
    sys.exit(main())
