"""What Ray's workers run first in these tests: every pass of the model is noted in a file, and one may end the worker.

It is sent to the workers by value (or found by their `sitecustomize`), since they do not have the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def counting(folder: str) -> Callable[[], None]:
    """Return what makes a process note, in `folder`/passes, the key of each chunk that its model is run for.

    A worker that finds the file `die` or `hold` there, and has computed as many chunks as that says, waits until all
    those are stored, and then kills itself, or makes the file `held` and waits to be killed.
    """

    def install() -> None:
        import os
        import signal
        import time
        from pathlib import Path

        from prophetkv_rag.distributed import worker as module

        begin = module.ChunkWorker.start
        files, computed = Path(folder), []

        def note(worker: Any, ids: Any) -> None:
            key = worker.engine.identity.key(ids)
            computed.append(key)
            with (files / "passes").open("a") as file:
                file.write(f"{key}\n")

        def is_wanted(name: str) -> bool:
            path = files / name
            return path.exists() and len(computed) >= int(path.read_text())

        def before_a_pass(worker: Any) -> None:
            if not (is_wanted("die") or is_wanted("hold")):
                return
            while not all(worker._is_there(key) for key in computed):
                worker.store.flush()
                time.sleep(0.01)
            if is_wanted("die"):
                (files / "die").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            (files / "held").touch()
            time.sleep(600)

        def start(worker: Any, *arguments: Any) -> Any:
            from prophetkv_rag.chunks import encoder

            alone, behind = encoder.encode_chunks, encoder.encode_behind

            def encode_chunks(runner: Any, support: Any, prefix: Any, chunks: Any, **options: Any) -> Any:
                before_a_pass(worker)
                for index, cache in alone(runner, support, prefix, chunks, **options):
                    note(worker, chunks[index])
                    yield index, cache

            def encode_behind(runner: Any, support: Any, prefix: Any, jobs: Any) -> Any:
                before_a_pass(worker)
                for job in jobs:
                    note(worker, job.input_ids)
                return behind(runner, support, prefix, jobs)

            encoder.encode_chunks, encoder.encode_behind = encode_chunks, encode_behind
            return begin(worker, *arguments)

        module.ChunkWorker.start = start  # type: ignore[method-assign]

    return install


def passes(folder: Path) -> list[str]:
    """The keys of the chunks that were computed, in the order of the passes."""
    path = folder / "passes"
    return path.read_text().split() if path.exists() else []
