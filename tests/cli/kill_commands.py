"""Kills `prophetkv-rag` itself at random points of index (also of files that changed or went), warm, gc and clear.

Every command is a fork of a process that has imported all it needs. A third is killed after a random time, the others
at a random one of the steps that Python can see: opening, renaming, removing and locking files of the cache directory.
`run(200, seed)` takes about fifteen minutes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chromadb  # noqa: F401  # so that no fork has to import it
import llama_index.core  # noqa: F401
import torch

import prophetkv_rag.defaults
from prophetkv_rag import ProphetKVEngine
from prophetkv_rag.chroma.store import live_references
from prophetkv_rag.cli.app import main
from prophetkv_rag.cli.cache.opened import open_caches
from prophetkv_rag.cli.database import open_database
from prophetkv_rag.cli.database_settings import require_settings
from tests.tiny import save_tiny, save_tiny_encoder, text_of

torch.set_num_threads(1)  # a fork of a process whose OpenMP has started threads hangs in its first parallel region

COMMANDS = ("index", "index", "warm", "warm", "gc", "clear")
ENCODINGS = ("plain", "previous:2", "neighbours:2")
EVENTS = ("open", "os.remove", "os.rename", "os.mkdir", "fcntl.flock")
ROUNDS_PER_DATABASE = 10


def forked(action: Callable[[], Any], *, kill_after: float | None = None) -> int:
    """Run something in a fork; returns its exit status, negative for a signal. It starts to be killed at its start."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                status = int(action() or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def command(*arguments: str, database: Path, kill_at: int | None = None) -> int:
    """Run the program, in a fork; it is killed at its `kill_at`-th step."""
    steps = 0

    def count(event: str, values: tuple[Any, ...]) -> None:
        nonlocal steps
        if event in EVENTS and (event == "fcntl.flock" or str(database / "prophetkv") in str(values[0])):
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at is not None:
        sys.addaudithook(count)
    with contextlib.redirect_stderr(io.StringIO()):
        return main([*arguments, "--db", str(database)])


def change(docs: Path, database: Path, generator: random.Random) -> None:
    """Files come, go and change; blobs are lost."""
    for _ in range(generator.randrange(3)):
        path = docs / f"{generator.randrange(5)}.txt"
        if path.exists() and generator.random() < 0.3 and len(list(docs.iterdir())) > 1:
            path.unlink()
        else:
            path.write_text(text_of(generator.choice([40, 90]), seed=generator.randrange(20)))
    for path in list((database / "prophetkv" / "blobs").rglob("*.safetensors")):
        if generator.random() < 0.15:
            path.unlink()


def look(database: Path, seed: int, *, is_cleared: bool) -> None:
    """Nothing wrong is served, nothing that was promised is lost; `clear` has taken promises back until all is warm."""
    store = open_caches(database)
    report = store.verify()
    assert report.bad == (), report
    assert report.orphans == (), report
    assert report.catalog == ""
    store.close()
    opened = open_database(database, require_settings(database))
    engine, collection = opened.engine, opened.collection
    (carried,) = live_references(opened.client).values()
    if not is_cleared:
        held = set(engine.store.references(collection.owner))
        assert carried <= held, "records refer to caches that the store does not hold for them"
        assert all(engine.store.knows(key) for key in carried)
        assert all(key in engine.chunk_index for key in carried), "every record's text is found in prompts"
    for path in (database / "prophetkv" / "blobs").rglob("*.safetensors"):
        traces = engine.store.files.read_header(path.stem).behind.traces
        assert engine.store.known(traces) == set(traces), "a cache outlived what left its trace in it"
    texts = collection.get(include=["documents"])["documents"]
    picked = random.Random(seed).sample(texts, min(3, len(texts)))
    if picked:
        ratio = 0.0 if engine.config.encoding == "plain" else 1.0  # what stands before a chunk is not the same there
        found = engine.prefill("Read: " + " ".join(picked) + " So?", recompute_ratio=ratio)
        clean = ProphetKVEngine(engine.model, engine.tokenizer, config=engine.config)
        clean.add_chunks(
            [text for text in picked if clean.library.identity.key(_ids(clean, text)) in engine.chunk_index]
        )
        wanted = clean.prefill("Read: " + " ".join(picked) + " So?", recompute_ratio=ratio)
        assert len(found.report.chunks) == len(wanted.report.chunks)
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    opened.close()


def _ids(engine: ProphetKVEngine, text: str) -> list[int]:
    return engine.library.tokens.chunk(text.strip())


def collect(database: Path, *, is_cleared: bool) -> None:
    """After a collection there is what the records refer to, and nothing else."""
    assert command("cache", "gc", "--grace", "0", database=database) == 0
    store = open_caches(database)
    from prophetkv_rag.cli.database import open_chroma

    client, _ = open_chroma(database)
    (carried,) = live_references(client).values()
    files = {path.stem for path in (database / "prophetkv" / "blobs").rglob("*") if path.is_file()}
    known = {row.key for row in store.catalog.rows()}
    assert files <= known
    assert known == carried or (is_cleared and known < carried), (len(known), len(carried))
    assert list((database / "prophetkv" / "incoming").iterdir()) == []
    assert store.leases.held() == set()
    store.close()


def check(database: Path, seed: int, *, is_cleared: bool) -> None:
    """Look, then collect: both in one fork, as each has to open everything."""
    look(database, seed, is_cleared=is_cleared)
    collect(database, is_cleared=is_cleared)


def finish(docs: Path, database: Path) -> None:
    """Run again, everything comes to its end: every chunk of every file is there, and stored."""
    assert command("index", str(docs), "--chunk-size", "64", database=database) == 0
    assert command("cache", "warm", database=database) == 0
    assert command("cache", "verify", database=database) == 0
    opened = open_database(database, require_settings(database))
    (carried,) = live_references(opened.client).values()
    assert all(key in opened.engine.store for key in carried)
    names = {str(found["file"]) for found in opened.collection.get(include=["metadatas"])["metadatas"]}
    assert names == {path.name for path in docs.iterdir()}
    opened.close()


def one(step: str, docs: Path, database: Path, generator: random.Random, tally: Counter[str]) -> bool:
    """Kill one command; not all get as far as where they would be killed. Returns whether it was."""
    arguments = {
        "index": ("index", str(docs), "--chunk-size", "64"),
        "warm": ("cache", "warm"),
        "gc": ("cache", "gc", "--grace", "0"),
        "clear": ("cache", "clear", "--all"),
    }[step]
    if generator.random() < 1 / 3:
        longest = {"index": 1.2, "warm": 1.0, "gc": 0.4, "clear": 0.1}[step]
        action = partial(command, *arguments, database=database)
        status = forked(action, kill_after=generator.uniform(0.0, longest))
    else:
        most = {"index": 120, "warm": 90, "gc": 40, "clear": 40}[step]
        status = forked(partial(command, *arguments, database=database, kill_at=generator.randint(1, most)))
    assert status in (0, -signal.SIGKILL), (step, status)
    tally[step + (" killed" if status else " done")] += 1
    return status != 0


def run(trials: int, seed: int) -> Counter[str]:
    """Kill until `trials` commands really were; returns how many of each."""
    generator = random.Random(seed)
    tally: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["PROPHETKV_CACHE_DIR"] = str(root / "cache")
        model, encoder = save_tiny(root / "model"), save_tiny_encoder(root / "encoder")
        prophetkv_rag.defaults.fetch_default_model = lambda progress: model  # type: ignore[assignment]
        prophetkv_rag.defaults.fetch_embedding_model = lambda progress=None: encoder  # type: ignore[assignment]
        for number in range(trials):
            docs, database = root / f"docs{number}", root / f"db{number}"
            docs.mkdir()
            for name in range(4):
                (docs / f"{name}.txt").write_text(text_of(60, seed=name))
            arguments = ("index", str(docs), "--chunk-size", "64", "--encoding", ENCODINGS[number % len(ENCODINGS)])
            assert forked(partial(command, *arguments, database=database)) == 0
            is_cleared, steps = False, []
            for _ in range(min(ROUNDS_PER_DATABASE, 1 + trials // len(ENCODINGS))):  # some of each encoding
                if _killed(tally) >= trials:
                    break
                change(docs, database, generator)
                step = generator.choice(COMMANDS)
                steps.append((step, one(step, docs, database, generator, tally)))
                is_cleared = step == "clear" or (is_cleared and steps[-1] != ("warm", False))
                if tally.total() % 10 == 0:
                    print(json.dumps(tally), file=sys.stderr, flush=True)
                checked = partial(check, database, generator.randrange(1 << 30), is_cleared=is_cleared)
                assert forked(checked) == 0, steps
            assert forked(partial(finish, docs, database)) == 0
            if _killed(tally) >= trials:
                break
    return tally


def _killed(tally: Counter[str]) -> int:
    return sum(count for name, count in tally.items() if name.endswith("killed"))
