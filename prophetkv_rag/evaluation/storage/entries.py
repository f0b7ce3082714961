"""What a large catalog costs: opening the store and the engine's index of texts, finding chunks, look-ups, additions.

The catalog is filled with entries of made-up texts; there are no blobs, which none of these reads.
"""

from __future__ import annotations

import gc
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prophetkv_rag.prompt import ChunkIndex, text_entry
from prophetkv_rag.store.disk import DiskStore

_FINGERPRINT = "f" * 64
_TOKENS, _NBYTES = 256, 1 << 20
_INSERT = (
    "INSERT INTO chunks (key, fingerprint, num_tokens, nbytes, anchor, length, digest) VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_WORDS = 24


@dataclass(frozen=True, slots=True)
class EntriesResult:
    """Medians over `rounds` openings, and over all prompts and look-ups of each.

    Attributes:
        entries: Chunks in the catalog.
        rounds: Openings.
        store_ms: Opening the store.
        open_ms: That, reading all entries and making the engine's index of them.
        open_cpu_ms: The same in processor time, which other programs disturb less.
        find_ms: Finding the chunks of one prompt.
        prompt_chars: Its length.
        prompt_chunks: Chunks in it, all of which were found.
        look_up_us: Asking the store whether it has a chunk.
        add_us: Making one more chunk known, to the store and to the index.
        new_entries_us: Asking for what other processes added, before every prompt.
        index_mb: Memory that the index takes: the process's growth, MB.
    """

    entries: int
    rounds: int
    store_ms: float
    open_ms: float
    open_cpu_ms: float
    find_ms: float
    prompt_chars: int
    prompt_chunks: int
    look_up_us: float
    add_us: float
    new_entries_us: float
    index_mb: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def text_number(number: int) -> str:
    """Return the text of an entry: words that are different for every number, as chunks of documents are."""
    digits = hashlib.shake_128(str(number).encode()).hexdigest(4 * _WORDS)
    words = " ".join(digits[start : start + 8] for start in range(0, len(digits), 8))
    return f"Report {number}: {words}."


def run_entries(
    entries: int, *, rounds: int = 5, prompts: int = 20, prompt_chunks: int = 40, on_step: Callable[[int], None]
) -> EntriesResult:
    """Fill a catalog, then open it again and again.

    Args:
        entries: Chunks in the catalog.
        rounds: Openings.
        prompts: Prompts searched in every round.
        prompt_chunks: Chunks in each.
        on_step: Called with how many entries or rounds are done.
    """
    found: dict[str, list[float]] = {}
    chars = 0
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        _fill(Path(folder), entries, on_step)
        for number in range(rounds):
            gc.collect()
            before = _resident_mb()
            index, started = ChunkIndex(), time.process_time()
            with _Clock(found, "open_ms", 1e3):
                with _Clock(found, "store_ms", 1e3):
                    store = DiskStore(Path(folder), 0)
                index.load(store.entry_columns(_FINGERPRINT))
            found.setdefault("open_cpu_ms", []).append(1e3 * (time.process_time() - started))
            found.setdefault("index_mb", []).append(_resident_mb() - before)
            for _ in range(prompts):
                picked = generator.choice(entries, size=min(prompt_chunks, entries), replace=False)
                prompt = "Context:\n" + "\n\n".join(text_number(int(i)) for i in picked) + "\n\nQuestion: what is said?"
                chars = len(prompt)
                with _Clock(found, "find_ms", 1e3):
                    matches = index.find(prompt)
                assert len(matches) == len(picked)
                with _Clock(found, "new_entries_us", 1e6):
                    list(store.new_entries(_FINGERPRINT))
                with _Clock(found, "look_up_us", 1e6):
                    assert store.knows(matches[0].key)
            for extra in range(prompts):
                text = text_number(entries + number * prompts + extra)
                entry = text_entry(text)
                assert entry is not None
                with _Clock(found, "add_us", 1e6):
                    store.note(_key(text), fingerprint=_FINGERPRINT, num_tokens=_TOKENS, entry=entry)
                    index.add(_key(text), entry)
            store.close()
            on_step(1)
    medians: dict[str, Any] = {name: statistics.median(values) for name, values in found.items()}
    medians["index_mb"] = found["index_mb"][0]  # later rounds find the first one's memory free
    return EntriesResult(entries, rounds, prompt_chars=chars, prompt_chunks=min(prompt_chunks, entries), **medians)


class _Clock:
    def __init__(self, found: dict[str, list[float]], name: str, scale: float) -> None:
        self._found, self._name, self._scale = found, name, scale

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._found.setdefault(self._name, []).append(self._scale * (time.perf_counter() - self._started))


def _fill(directory: Path, entries: int, on_step: Callable[[int], None]) -> None:
    def rows() -> Iterator[tuple[Any, ...]]:
        for number in range(entries):
            text = text_number(number)
            entry = text_entry(text)
            assert entry is not None
            yield _key(text), _FINGERPRINT, _TOKENS, _NBYTES, entry.anchor, entry.length, entry.digest
            on_step(1)

    store = DiskStore(directory, 0)
    with store.catalog.transaction() as run:
        run.executemany(_INSERT, rows())
    store.close()


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _resident_mb() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # not Linux
        return float("nan")
    return pages * 4096 / 1e6
