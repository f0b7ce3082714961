"""The pass that encodes chunks behind their neighbours, where the process is forked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.vector_stores import NeighbourPass, Placed
from tests.forked import NOT_FOR_EVER_S, Child
from tests.tiny import tiny_llama, tiny_tokenizer


class Nowhere:
    """Has no records; keeps its thread until it may go on."""

    def __init__(self) -> None:
        self.is_asked, self.may_go_on = threading.Event(), threading.Event()

    def place(self, names: Sequence[str]) -> tuple[list[Placed], int]:
        self.is_asked.set()
        self.may_go_on.wait(NOT_FOR_EVER_S)
        return [], 0

    def nearest(self, placed: Sequence[Placed], count: int) -> list[list[str]]:
        return []


def test_a_child_has_a_thread_of_its_own() -> None:
    """And does not wait for what the parent's has to do."""
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(encoding="neighbours:1"))
    behind = NeighbourPass(engine, "owner", "a place", nullcontext)
    parents, childs = Nowhere(), Nowhere()
    behind.later(["a"], lambda names: parents)
    assert parents.is_asked.wait(NOT_FOR_EVER_S)
    childs.may_go_on.set()

    def in_child() -> bool:
        behind.later(["b"], lambda names: childs)
        behind.wait()
        return childs.is_asked.is_set()

    child = Child(in_child)
    assert child.result() is True
    parents.may_go_on.set()
    behind.wait()
