"""Peak memory of one query, measured in a process of its own: a process's peak never goes down again.

The chunks are indexed by the parent into a directory, so the child pays for loading the model and for the query only.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.evaluation.speed.ttft import corpus_prompt
from prophetkv_rag.store.disk import DiskStore


def peak_memory_bytes(
    model: str,
    store_directory: Path,
    *,
    context_tokens: int,
    chunk_tokens: int,
    strategy: str,
    recompute_ratio: float,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, int]:
    """Return `{"loaded", "peak"}`: bytes of resident memory before the query, and at their highest during it."""
    arguments = [model, str(store_directory), context_tokens, chunk_tokens, strategy, recompute_ratio]
    arguments += [str(dtype).removeprefix("torch."), str(device)]
    child = subprocess.run(
        [sys.executable, "-m", "prophetkv_rag.evaluation.speed.memory", json.dumps(arguments)],
        check=True,
        capture_output=True,
        text=True,
    )
    measured: dict[str, int] = json.loads(child.stdout.strip().splitlines()[-1])
    return measured


def _reset_peak() -> None:
    """Start a new high-water mark (Linux), as loading a model needs more than a query does."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="ascii")


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _main(arguments: str) -> None:
    model, directory, context_tokens, chunk_tokens, strategy, recompute_ratio, dtype, device = json.loads(arguments)
    engine = ProphetKVEngine.from_pretrained(
        model, store=DiskStore(Path(directory)), dtype=getattr(torch, dtype), device=device
    )
    prompt = corpus_prompt(engine, context_tokens, chunk_tokens)
    gc.collect()
    _reset_peak()
    loaded = _peak()
    engine.prefill(prompt, strategy=strategy, recompute_ratio=recompute_ratio)
    sys.stdout.write(json.dumps({"loaded": loaded, "peak": _peak()}) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1])
