"""Kills processes at random points of indexing, deleting, collecting and warming, and looks at what they leave.

The model is loaded once; every victim is a fork. `run(200, seed)` takes about two minutes.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.upkeep import gc
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

torch.set_num_threads(1)  # a fork of a process whose OpenMP has started threads hangs in its first parallel region

MODEL, TOKENIZER = tiny_llama(), tiny_tokenizer()
TEXTS = [text_of(16, seed=seed) for seed in range(10)]
STEPS = ("index", "delete", "gc", "warm", "query")
ROUNDS_PER_DIRECTORY = 8


def make_engine(store: DiskStore | None) -> ProphetKVEngine:
    config = ProphetKVConfig(index_batch_tokens=64, recompute_ratio=0.0)
    return ProphetKVEngine(MODEL, TOKENIZER, config=config, store=store)


CLEAN = make_engine(None)
KEYS = CLEAN.add_chunks(TEXTS)


def prompt_of(numbers: list[int]) -> str:
    return "Read: " + " ".join(TEXTS[number] for number in numbers) + " So?"


def victim(directory: Path, limit: int | None, step: str, seed: int, report: int) -> None:
    """Do one thing over and over until killed; says by the pipe what is stored and what is deleted for good."""
    generator = random.Random(seed)
    store = DiskStore(directory, 0, max_bytes=limit, policy="on_first_use" if step == "warm" else "eager")
    engine = make_engine(store)
    owner = generator.choice(["a", "b"])
    if step == "warm":
        engine.add_chunks(TEXTS, owner=owner)
        store.policy = "eager"
    os.write(report, b"started\n")
    while True:
        numbers = generator.sample(range(len(TEXTS)), 3)
        keys = [KEYS[number] for number in numbers]
        if step in ("index", "warm"):
            os.write(report, f"index {owner} {' '.join(map(str, numbers))}\n".encode())
            engine.add_chunks([TEXTS[number] for number in numbers], owner=owner)
            os.write(report, f"indexed {owner} {' '.join(map(str, numbers))}\n".encode())
        if step in ("index", "delete", "gc"):
            os.write(report, f"delete {owner} {' '.join(map(str, numbers[:2]))}\n".encode())
            engine.remove_chunks(keys[:2], owner=owner)
            if step != "gc":
                engine.add_chunks([TEXTS[number] for number in numbers[:1]], owner=owner)
                os.write(report, f"indexed {owner} {numbers[0]}\n".encode())
        if step == "gc":
            engine.add_chunks([TEXTS[number] for number in numbers], owner="c")
            gc(store, {"a": set(), "b": set(KEYS)}, grace_s=-1)
        if step == "query":
            engine.prefill(prompt_of(numbers))


def killed(directory: Path, limit: int | None, step: str, seed: int, delay: float) -> list[str]:
    """Fork a victim and kill it `delay` seconds after it has started; returns its complete lines."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            victim(directory, limit, step, seed, writing)
        finally:
            os._exit(status)
    os.close(writing)
    data = os.read(reading, 8)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    while part := os.read(reading, 65536):
        data += part
    os.close(reading)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the victim ended by itself"
    assert data.startswith(b"started\n")
    return data.decode().split("\n")[1:-1]


def on_disk(directory: Path) -> int:
    paths = [path for name in ("blobs", "incoming") for path in (directory / name).rglob("*")]
    return sum(path.stat().st_size for path in paths if path.is_file())


def check(directory: Path, limit: int | None, references: dict[str, set[int]], generator: random.Random) -> None:
    """Nothing wrong is served, nothing that was promised is lost, nothing deleted is there, no orphan stays."""
    store = DiskStore(directory, 0, max_bytes=limit)
    assert limit is None or on_disk(directory) <= limit
    report = store.verify()
    assert report.bad == (), report
    assert report.orphans == (), report
    promised = set().union(*(references[owner] for owner in references))
    for owner, numbers in references.items():
        assert {KEYS[number] for number in numbers} <= set(store.references(owner)), owner
    assert all(store.knows(KEYS[number]) for number in promised)
    if limit is None:
        missing = set(report.missing)
        assert all(KEYS[number] in store or KEYS[number] in missing for number in promised)
    engine = make_engine(store)
    numbers = generator.sample(range(len(TEXTS)), 4)
    found, wanted = engine.prefill(prompt_of(numbers)), CLEAN.prefill(prompt_of(numbers))
    if len(found.report.chunks) == len(numbers):
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)  # a clean run's answer
    store.flush()  # what the question had computed is being written
    gc(store, grace_s=-1)
    known = {row.key for row in store.catalog.rows()}
    files = list((directory / "blobs").rglob("*.safetensors"))
    assert {path.stem for path in files} <= known
    assert list((directory / "incoming").iterdir()) == []
    assert store.stats().nbytes >= sum(path.stat().st_size for path in files)
    assert store.leases.held() == set()
    store.close()


def settle(references: dict[str, set[int]], lines: list[str]) -> None:
    """What is promised after these lines; what was begun and not finished is promised either way, so by neither."""
    for line in lines:
        word, owner, *numbers = line.split()
        chunks = {int(number) for number in numbers}
        if word == "indexed":
            references[owner] |= chunks
        elif word == "delete":
            references[owner] -= chunks


def run(trials: int, seed: int) -> Counter[str]:
    generator = random.Random(seed)
    done: Counter[str] = Counter()
    while done.total() < trials:
        with tempfile.TemporaryDirectory() as folder:
            directory, references = Path(folder), {"a": set[int](), "b": set[int]()}
            limit = generator.choice([None, None, 60_000])
            for _ in range(min(ROUNDS_PER_DIRECTORY, trials - done.total())):
                step = generator.choice(STEPS)
                lines = killed(directory, limit, step, generator.randrange(1 << 30), generator.uniform(0, 0.12))
                settle(references, lines)
                if step == "gc":  # it was told that "a" has no records
                    references["a"].clear()
                check(directory, limit, references, generator)
                done[step] += 1
    return done
