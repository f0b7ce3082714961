"""A process that forks: locks are whole on both sides, and an engine goes on in the parent and in the child."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVEngine, forks
from prophetkv_rag.forks import around_fork, kept_from_children
from prophetkv_rag.model.attention import AttentionPass, attention_implementation
from prophetkv_rag.once import once
from prophetkv_rag.store.disk import DiskStore
from tests.forked import NOT_FOR_EVER_S, Child, Elsewhere, forked
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[1]
TEXTS = [text_of(60, seed=seed) for seed in range(3)]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no os.fork")


def prompt(*more: str) -> Prompt:
    return Prompt("Context: ", [*TEXTS, *more], " Question: who?", glue="\n\n")


class Owner:
    """Two numbers that are equal whenever nobody holds the lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.one = self.two = 0
        self.children = 0
        around_fork(self, "_lock", in_child=Owner._count)

    def _count(self) -> None:
        self.children += 1
        assert self._lock.locked()

    def change(self) -> None:
        with self._lock:
            self.one += 1
            self.two += 1


def test_what_a_lock_guards_is_whole_in_the_child() -> None:
    owner, is_over = Owner(), threading.Event()

    def change() -> None:
        while not is_over.is_set():
            owner.change()

    def look() -> list[Any]:
        owner.change()
        return [owner.one == owner.two, owner.children]

    threads = [threading.Thread(target=change) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert [forked(look) for _ in range(20)] == [[True, 1]] * 20
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert owner.children == 0
    owner.change()


def test_a_fork_waits_for_who_holds_a_lock() -> None:
    """Seen from within: another hook, which runs first, lets the holder go on; the child finds the lock free."""
    owner = Owner()
    holder = Elsewhere(lambda: owner._lock)
    os.register_at_fork(before=holder.let_go)  # hooks run in the reverse order; it cannot be taken back, and is idle
    assert forked(lambda: owner._lock.acquire(timeout=0)) is True
    holder.leave()


class Slow:
    """Computes a property for as long as it is told to."""

    def __init__(self) -> None:
        self.may_begin, self.may_end = threading.Event(), threading.Event()

    @once
    def value(self) -> list[int]:
        self.may_begin.set()
        assert self.may_end.wait(NOT_FOR_EVER_S)
        return [1]


def test_a_property_that_a_thread_computes_meanwhile_is_computed_in_the_child() -> None:
    busy, other = Slow(), Slow()
    thread = threading.Thread(target=lambda: busy.value)
    thread.start()
    assert busy.may_begin.wait(NOT_FOR_EVER_S)
    other.may_end.set()
    assert forked(lambda: other.value) == [1]
    busy.may_end.set()
    assert busy.value is busy.value  # whoever computed it
    thread.join()


def test_no_property_has_a_lock_that_all_objects_share() -> None:
    """As `functools.cached_property` before Python 3.12."""
    sources = [
        path for folder in ("prophetkv_rag", "integrations", "kernels") for path in (ROOT / folder).rglob("*.py")
    ]
    assert [path.name for path in sources if "import cached_property" in path.read_text("utf-8")] == []


def test_what_nobody_uses_any_more_is_forgotten() -> None:
    before = len(forks._entries)
    owner = Owner()
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None
    assert len(forks._entries) <= before


def test_a_descriptor_is_closed_in_the_child_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()

    def inherited() -> list[str]:
        return [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if is_there(name)]

    def is_there(name: str) -> bool:
        return os.path.exists(f"/proc/self/fd/{name}")

    with kept_from_children(os.open(path, os.O_RDWR)) as descriptor:
        assert str(path) in inherited()
        assert str(path) not in forked(inherited)
        os.fstat(descriptor)  # still open here


def test_a_block_that_is_left_in_the_child_closes_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    with ExitStack() as block:
        number = block.enter_context(kept_from_children(os.open(tmp_path / "one", os.O_RDWR | os.O_CREAT)))

        def in_child() -> int:
            os.dup2(os.open(tmp_path / "other", os.O_RDONLY), number)  # it is free here, so another file may get it
            block.close()
            return os.fstat(number).st_size

        assert forked(in_child) == 5


def assert_same(logits: list[list[float]], expected: list[list[float]]) -> None:
    """A child computes on one thread, which adds up in another order."""
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_engine_answers_in_the_parent_and_in_the_child(where: str, tmp_path: Path) -> None:
    store = None if where == "memory" else DiskStore(tmp_path)
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), store=store)
    engine.add_chunks(TEXTS)
    expected = engine.prefill(prompt("Computed in the parent, before anything is forked.")).logits.tolist()
    engine.store.flush()

    def answer(name: str) -> list[float]:
        got: list[float] = engine.prefill(prompt(f"Computed by the {name} alone, and by nobody else at all.")).logits
        engine.store.flush()
        again = engine.prefill(prompt("Computed in the parent, before anything is forked.")).logits
        assert_same(again.tolist(), expected)
        return got.tolist()

    children = [Child(lambda: answer("child")) for _ in range(3)]
    here = answer("child")
    for child in children:
        assert_same(child.result(), here)
    if where == "disk":
        assert engine.store.verify().num_faults == 0
    engine.store.close()


def test_a_fork_waits_for_the_pass_that_runs() -> None:
    """Else the child would have a model whose attention is switched for ever, and a lock that is never released."""
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    expected = engine.prefill(prompt()).logits.tolist()

    class Nothing(AttentionPass):
        def attend(self, call: Any) -> Any:
            raise NotImplementedError

    class Running:
        def __enter__(self) -> None:
            engine.model_lock.acquire()
            self.switched = attention_implementation(engine.model, Nothing())
            self.switched.__enter__()

        def __exit__(self, *error: object) -> None:
            self.switched.__exit__(None, None, None)
            engine.model_lock.release()

    running = Elsewhere(Running)
    assert engine.model.config._attn_implementation == "prophetkv"
    os.register_at_fork(before=running.let_go)

    def in_child() -> Any:
        return [engine.model.config._attn_implementation, engine.prefill(prompt()).logits.tolist()]

    attention, logits = forked(in_child)
    assert attention == "sdpa"
    assert_same(logits, expected)
    running.leave()


THREADS = """
import logging, os, sys
import torch
torch.set_num_threads(2)
from prophetkv_rag import Prompt, ProphetKVEngine
from tests.tiny import text_of, tiny_llama, tiny_tokenizer
logging.basicConfig(format="%(message)s")
engine = ProphetKVEngine(tiny_llama(hidden_size=256, intermediate_size=512), tiny_tokenizer())
text = Prompt("Context: ", [text_of(800)], "Question: who?")
(torch.ones(900, 900) @ torch.ones(900, 900)).sum()
engine.prefill(text)
if os.fork() == 0:
    engine.prefill(text)
    engine.prefill(text)
    print("child", torch.get_num_threads(), flush=True)
    os._exit(0)
os.wait()
engine.prefill(text)
print("parent", torch.get_num_threads())
"""


def test_a_child_of_a_process_with_many_threads_does_not_hang() -> None:
    """OpenMP's threads do not cross a fork, and a child that counts on them waits for ever."""
    run = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    assert run.stdout.split() == ["child", "1", "parent", "2"]
    said = [line for line in run.stderr.splitlines() if "forked from one that had loaded its model" in line]
    assert len(said) == 1
    assert "load the model after the fork" in said[0]
