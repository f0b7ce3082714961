"""Two namespaces on one store: whether the other one has a text cannot be told from what one's own calls do.

No time is measured: calls that run the same passes and statements and touch the same files take the same time.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.store.disk.store import DiskStore
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

MODEL = tiny_llama()
TEXTS = [text_of(20, seed=seed) for seed in range(3)]
PROMPT = "Read: " + " ".join(TEXTS) + " So?"


def engine_of(store: DiskStore, namespace: str) -> ProphetKVEngine:
    return ProphetKVEngine(MODEL, tiny_tokenizer(), config=ProphetKVConfig(namespace=namespace), store=store)


class Watch:
    """Writes down the model's passes, the catalog's statements and the blobs that are opened."""

    def __init__(self, store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        self._connections = (store.catalog._reader, store.catalog._writer)
        for connection in self._connections:
            connection.set_trace_callback(self._statement)
        self._hook = MODEL.model.register_forward_pre_hook(self._pass, with_kwargs=True)
        real, path_open = os.open, Path.open

        def opened(path: Any, *arguments: Any, **options: Any) -> int:
            self._file(path)
            return real(path, *arguments, **options)

        def path_opened(path: Path, *arguments: Any, **options: Any) -> Any:
            self._file(path)
            return path_open(path, *arguments, **options)

        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(Path, "open", path_opened)

    def _statement(self, statement: str) -> None:
        statement = re.sub(r"\d+\.\d+(e[+-]?\d+)?", "#", statement)  # times
        self.steps.append(re.sub(r"\bid > \d+", "id > #", statement))  # how many rows there are

    def _pass(self, module: Any, arguments: Any, options: Any) -> None:
        self.steps.append(f"pass {[tuple(v.shape) for v in options.values() if hasattr(v, 'shape')]}")

    def _file(self, path: Any) -> None:
        if str(path).endswith(".safetensors"):
            self.steps.append(f"open {Path(path).name}")

    def end(self) -> list[str]:
        self._hook.remove()
        for connection in self._connections:
            connection.set_trace_callback(None)
        return self.steps


def steps_of_b(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, neighbour_has: int, limits: dict[str, int]
) -> list[str]:
    """Everything that tenant "b" makes happen, where tenant "a" has the first so many of the texts."""
    store = DiskStore(directory, **limits)
    first = engine_of(store, "a")
    first.add_chunks(TEXTS[:neighbour_has], owner="owner of a")
    first.prefill(PROMPT)
    second = engine_of(store, "b")
    store.flush()
    with monkeypatch.context() as patch:
        watch = Watch(store, patch)
        assert second.prefill(PROMPT).report.chunks == []
        keys = second.add_chunks(TEXTS[:2], owner="owner of b")
        assert [chunk.status for chunk in second.prefill(PROMPT).report.chunks] == ["hit", "hit"]
        store.flush()
        store.drop_from_memory(keys)
        assert [chunk.status for chunk in second.prefill(PROMPT).report.chunks] == ["hit", "hit"]
        store.flush()
        assert second.remove_chunks(keys, owner="owner of b") == keys
        assert second.prefill(PROMPT).report.chunks == []
        steps = watch.end()
    assert len(first.prefill(PROMPT).report.chunks) == neighbour_has, "what b deletes is b's"
    store.close()
    return steps


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_bytes": 240_000, "namespace_max_bytes": 120_000, "namespace_ram_bytes": 120_000}],
    ids=["without limits", "with limits of their own"],
)
def test_what_a_tenant_s_calls_do_does_not_depend_on_what_another_tenant_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    alone = steps_of_b(tmp_path / "alone", monkeypatch, neighbour_has=0, limits=limits)
    assert sum(step.startswith("pass") for step in alone) >= 6
    assert sum(step.startswith("open") for step in alone) >= 2
    assert sum("INSERT" in step for step in alone) >= 3
    for count in (1, 2, 3):
        beside = steps_of_b(tmp_path / str(count), monkeypatch, neighbour_has=count, limits=limits)
        if limits:  # the thread that writes and the one that asks whether there is room take turns as they like
            beside, alone = sorted(beside), sorted(alone)
        assert beside == alone


def test_the_same_namespace_can_be_told(tmp_path: Path) -> None:
    """The watch above would see a difference: within one namespace a text that is there is not computed again."""
    store = DiskStore(tmp_path)
    first, second = engine_of(store, "a"), engine_of(store, "a")
    first.add_chunks(TEXTS[:1])
    assert len(second.prefill(PROMPT).report.chunks) == 1
    store.close()
