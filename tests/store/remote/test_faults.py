"""Whatever a remote tier does, the answers are those of a clean run, and it costs one warning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
import torch

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.tiered import TieredStore
from tests.store.faulty_files import FaultyFileSystem, hanging, raising
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

MODEL = tiny_llama()
TEXTS = [text_of(20, seed=seed) for seed in range(4)]
PROMPT = "Read: " + " ".join(TEXTS) + " So?"
REMOTE = "faulty://bucket/caches"


def engine_on(store: TieredStore | None) -> ProphetKVEngine:
    return ProphetKVEngine(MODEL, tiny_tokenizer(), config=ProphetKVConfig(recompute_ratio=0.0), store=store)


CLEAN = engine_on(None)
KEYS = CLEAN.add_chunks(TEXTS)
WANTED = CLEAN.prefill(PROMPT).logits


def open_machine(directory: Path, **settings: object) -> TieredStore:
    """A machine that has no room of its own, so that every prompt needs the remote."""
    options = {"max_bytes": 0, "policy": "on_first_use", "remote_timeout_s": 30.0, "remote": REMOTE, **settings}
    return TieredStore(directory, 0, **options)  # type: ignore[arg-type]


def ask(engine: ProphetKVEngine) -> list[str]:
    result = engine.prefill(PROMPT)
    DiskStore.flush(engine.store)  # what waits for the disk would be found in memory; the remote is not waited for
    assert len(result.report.chunks) == len(TEXTS)
    torch.testing.assert_close(result.logits, WANTED, atol=1e-4, rtol=1e-4)
    return [chunk.status for chunk in result.report.chunks]


@pytest.fixture
def uploaded(tmp_path: Path) -> Iterator[None]:
    """Another machine has computed all chunks and put them there."""
    FaultyFileSystem.clear()
    store = TieredStore(tmp_path / "other", 0, remote=REMOTE)
    engine_on(store).add_chunks(TEXTS)
    store.flush()
    store.close()
    assert len(FaultyFileSystem.names()) == len(TEXTS)
    FaultyFileSystem.calls.clear()
    yield
    FaultyFileSystem.reset()


def flip(data: bytes) -> bytes:
    return data[:-50] + bytes([data[-50] ^ 4]) + data[-49:]


def swapped(data: bytes) -> bytes:
    return bytes(next(file for file in FaultyFileSystem.store.values() if file.getvalue() != data).getvalue())


def spoiling(spoil: Callable[[bytes], bytes], size: Callable[[int], object] | None = None) -> Callable[[], None]:
    def inject() -> None:
        FaultyFileSystem.spoil = staticmethod(spoil)
        if size is not None:
            FaultyFileSystem.size = staticmethod(size)

    return inject


def failing(error: Exception, *methods: str) -> Callable[[], None]:
    def inject() -> None:
        FaultyFileSystem.before = staticmethod(raising(error, *methods))

    return inject


class VendorError(Exception):
    """Some clients' errors are no OSErrors."""


FAULTS: dict[str, tuple[Callable[[], AbstractContextManager[None] | None], str]] = {
    "hangs": (hanging, "miss"),
    "hangs while reading": (lambda: hanging("cat_file"), "miss"),
    "connection reset": (failing(ConnectionResetError("reset by peer")), "miss"),
    "no permission": (failing(PermissionError("access denied")), "miss"),
    "vendor's own error": (failing(VendorError("503 slow down"), "cat_file", "pipe_file"), "miss"),
    "half comes": (spoiling(lambda data: data[: len(data) // 2]), "corrupt"),
    "half is there": (spoiling(lambda data: data[: len(data) // 2], lambda size: size // 2), "corrupt"),
    "bit flipped": (spoiling(flip), "corrupt"),
    "swapped": (spoiling(swapped, lambda size: size), "corrupt"),
    "empty": (spoiling(lambda data: b"", lambda size: 0), "corrupt"),
    "claims a petabyte": (spoiling(lambda data: data, lambda size: 10**15), "corrupt"),
    "does not know its size": (spoiling(lambda data: data, lambda size: None), "corrupt"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("uploaded")
def test_no_fault_changes_an_answer_and_each_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    inject, expected = FAULTS[fault]
    store = open_machine(tmp_path / "mine", remote_timeout_s=1.0 if "hangs" in fault else 30.0)
    engine = engine_on(store)
    engine.add_chunks(TEXTS)
    with ExitStack() as stack, caplog.at_level(logging.WARNING):
        context = inject()
        if context is not None:
            stack.enter_context(context)
        statuses = [ask(engine) for _ in range(3)]
        assert statuses[0] == [expected] * 4
        assert "hit" not in {status for row in statuses for status in row}
        if expected == "miss":
            asked = FaultyFileSystem.calls.total()
            assert ask(engine) == ["miss"] * 4
            assert FaultyFileSystem.calls.total() == asked, "it is left alone for a while"
    if "claims" in fault or "size" in fault:
        assert FaultyFileSystem.calls["cat_file"] == 0, "no memory was taken for it"
    assert len(caplog.records) == 1, caplog.text
    assert "remote tier faulty://bucket/caches" in caplog.text
    store.close()


@pytest.mark.usefixtures("uploaded")
def test_without_a_fault_every_cache_comes_from_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_machine(tmp_path / "mine")
    engine = engine_on(store)
    engine.add_chunks(TEXTS)
    with caplog.at_level(logging.WARNING):
        assert ask(engine) == ["hit"] * 4
        store.flush()  # what is just being put away would be found on its way
        assert ask(engine) == ["hit"] * 4
    assert caplog.records == []
    assert FaultyFileSystem.calls["cat_file"] == 8
    store.close()


@pytest.mark.usefixtures("uploaded")
def test_a_chunk_that_this_machine_never_added_is_found_by_its_name(tmp_path: Path) -> None:
    store = open_machine(tmp_path / "mine")
    engine = engine_on(store)
    for text in TEXTS:
        engine.library.register(text, owner="prompt")  # known to this process alone, as for altered texts
    assert ask(engine) == ["hit"] * 4
    assert FaultyFileSystem.calls["cat_file"] == 4, "what was read ahead was not read again"
    store.close()


@pytest.mark.usefixtures("uploaded")
def test_it_is_asked_again_after_a_while_and_heals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_machine(tmp_path / "mine")
    now = 0.0
    for breaker in (store.remote.reads, store.remote.writes):
        breaker._clock = lambda: now
    engine = engine_on(store)
    engine.add_chunks(TEXTS)
    with caplog.at_level(logging.WARNING):
        failing(ConnectionResetError("reset"))()
        assert ask(engine) == ["miss"] * 4
        assert store.stats().remote.is_answering is False  # type: ignore[union-attr]
        now = 16.0
        assert ask(engine) == ["miss"] * 4  # one call tries, and fails
        FaultyFileSystem.reset()
        now = 31.0
        assert ask(engine) == ["miss"] * 4, "it is left alone for twice as long"
        now = 47.0
        assert "hit" in ask(engine)  # one call tries, and it answers: by then others may ask too
        assert ask(engine) == ["hit"] * 4
    assert len(caplog.records) == 1, caplog.text
    store.close()


@pytest.mark.usefixtures("uploaded")
def test_bad_blobs_there_are_replaced(tmp_path: Path) -> None:
    for number, file in enumerate(FaultyFileSystem.store.values()):
        file.seek(-50, 2)
        file.write(b"?" * 50)
        if number % 2:
            file.truncate(1000)
    store = open_machine(tmp_path / "mine")
    engine = engine_on(store)
    engine.add_chunks(TEXTS)
    assert ask(engine) == ["corrupt"] * 4
    store.flush()
    assert ask(engine) == ["hit"] * 4
    store.close()


@pytest.mark.parametrize("fault", ["hangs", "connection reset", "no permission"])
def test_indexing_goes_on_without_it_and_the_next_push_makes_it_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    FaultyFileSystem.clear()
    with ExitStack() as stack, caplog.at_level(logging.WARNING):
        context = FAULTS[fault][0]()
        if context is not None:
            stack.enter_context(context)
        store = TieredStore(tmp_path, 0, remote=REMOTE, remote_timeout_s=0.05)
        engine = engine_on(store)
        assert engine.add_chunks(TEXTS) == KEYS
        assert ask(engine) == ["hit"] * 4
        store.flush()
        assert store.stats().remote.waiting == 4  # type: ignore[union-attr]
        store.close()
    FaultyFileSystem.clear()
    assert len(caplog.records) == 1, caplog.text
    store = TieredStore(tmp_path, 0, remote=REMOTE)
    assert store.push() == 4
    store.flush()
    assert store.push() == 0
    assert len(FaultyFileSystem.names()) == 4
    store.close()


def test_a_remote_that_may_only_be_read_is_still_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FaultyFileSystem.clear()
    other = TieredStore(tmp_path / "other", 0, remote=REMOTE)
    engine_on(other).add_chunks(TEXTS[:2])
    other.flush()
    failing(PermissionError("read only"), "pipe_file", "rm_file", "rm")()
    store = open_machine(tmp_path / "mine")
    engine = engine_on(store)
    engine.add_chunks(TEXTS)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert ask(engine) == ["hit", "hit", "miss", "miss"]
            store.flush()
    assert len(caplog.records) == 1, caplog.text
    FaultyFileSystem.reset()
    store.close()
    other.close()
