"""`prophetkv-rag serve --engine vllm` in processes of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

PROGRAM = str(Path(sys.executable).with_name("prophetkv-rag"))
VLLM_ARGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 8, "block_size": 32}


class Server(NamedTuple):
    """A server: its address, its process, and where its standard error goes."""

    url: str
    process: subprocess.Popen[str]
    log: Path


@contextmanager
def serving(
    model: Path,
    directory: Path,
    *arguments: str,
    database: Path | None = None,
    is_ended: bool = True,
    **settings: Any,
) -> Iterator[Server]:
    """Serve a model, or a database; at the end SIGTERM must end it with status 0, but where `is_ended` is false."""
    command = [PROGRAM, "serve", "--port", "0", "--json", *arguments]
    if database is not None:
        command += ["--database", str(database)]
    else:
        command += ["--engine", "vllm", "--model", str(model), "--cache-dir", str(directory / "caches")]
        command += ["--vllm-args", json.dumps(VLLM_ARGS | settings)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = directory / "log.txt"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            said = ""
            for line in process.stdout:
                said += line
                if line.startswith("}"):
                    break
            assert said, log.read_text()[-4000:]
            yield Server(json.loads(said)["url"], process, log)  # nothing else is on standard output
            if is_ended:
                process.send_signal(signal.SIGTERM)
                assert process.wait() == 0
        finally:
            process.kill()
