"""What loading chunk caches takes beside the prefill that needs them, and what other ways of loading would change.

Every way loads the same blobs of one prompt and hands them to the same assembly, as a map only moves the reading there:
times are of both together. Ways take turns within a round, as do warm and cold page caches.
"""

from __future__ import annotations

import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.evaluation.speed.ttft import corpus_prompt
from prophetkv_rag.prompt import PromptLayout
from prophetkv_rag.reuse import assemble_caches
from prophetkv_rag.store import ChunkCache, read_into_fresh
from prophetkv_rag.store.blobs import BlobFormat, decode_blob
from prophetkv_rag.store.disk import DiskStore


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One format, one way, warm or cold; times are medians over the rounds.

    Attributes:
        context_tokens: Tokens of all chunks.
        blob_format: The format; "encrypted" behind it where it was.
        way: How they were loaded: `"read"` is what the store does.
        is_cold: Whether the page cache was told to forget the blobs before.
        mbytes: Of all blobs, MB.
        load_ms: Until all caches are there, checked.
        total_ms: With their assembly.
        cpu_ms: The process's own time, all threads and the kernel's work for it included, in `total_ms`: what other
            programs on the machine disturb least.
        ratio: `total_ms` over that of `"read"`, by rounds (median).
        cpu_ratio: The same of `cpu_ms`.
        share_of_ttft: `load_ms` over the time to first token of a prefill with all caches in RAM: what at most could be
            won by hiding all of it.
    """

    context_tokens: int
    blob_format: str
    way: str
    is_cold: bool
    mbytes: float
    load_ms: float
    total_ms: float
    cpu_ms: float
    ratio: float
    cpu_ratio: float
    share_of_ttft: float


@dataclass(frozen=True, slots=True)
class _Blobs:
    """The blobs of a prompt's chunks in a store."""

    store: DiskStore
    layout: PromptLayout
    fingerprint: str

    def paths(self) -> list[Path]:
        return [self.store.files.path(chunk.key) for chunk in self.layout.chunks]

    def read(self, number: int) -> ChunkCache:
        chunk = self.layout.chunks[number]
        return self.store.files.read(chunk.key, fingerprint=self.fingerprint, input_ids=chunk.input_ids)[1]

    def decode(self, number: int, data: memoryview) -> ChunkCache:
        chunk = self.layout.chunks[number]
        return decode_blob(data, key=chunk.key, fingerprint=self.fingerprint, input_ids=chunk.input_ids)


def _read(blobs: _Blobs) -> list[ChunkCache]:
    """As the store does: a tensor at a time into fresh memory, checked at once."""
    return [blobs.read(number) for number in range(len(blobs.layout.chunks))]


def _threads(blobs: _Blobs) -> list[ChunkCache]:
    """The same in two threads, a blob each at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(blobs.read, range(len(blobs.layout.chunks))))


def _whole(blobs: _Blobs) -> list[ChunkCache]:
    """The whole file first, then all checks."""
    found = []
    for number, path in enumerate(blobs.paths()):
        with path.open("rb", buffering=0) as file:
            found.append(blobs.decode(number, read_into_fresh(file, path.stat().st_size)))
    return found


def _mapped(blobs: _Blobs) -> list[ChunkCache]:
    """Mapped, checked in place; the caches' memory is the page cache's."""
    found = []
    for number, path in enumerate(blobs.paths()):
        with path.open("rb") as file:
            found.append(blobs.decode(number, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))))
    return found


WAYS: dict[str, Callable[[_Blobs], list[ChunkCache]]] = {
    "read": _read,
    "two threads": _threads,
    "whole file first": _whole,
    "mapped": _mapped,
}
_OF_PLAIN_BLOBS = ("whole file first", "mapped")


def measure_loading(
    engine: ProphetKVEngine,
    formats: Sequence[tuple[BlobFormat, bool]],
    *,
    context_tokens: int,
    chunk_tokens: int = 256,
    ratio: float = 0.2,
    rounds: int = 9,
    on_step: Callable[[int], None] = lambda steps: None,
) -> list[LoadResult]:
    """Measure every way on one prompt of the shipped speeches.

    Args:
        engine: Its store gets the prompt's chunks.
        formats: Formats, and whether they are encrypted.
        context_tokens: Tokens of all chunks.
        chunk_tokens: Tokens of a chunk.
        ratio: Of chunk tokens recomputed by the prefill that loading is compared with.
        rounds: Measured, after one that warms up.
        on_step: Called with 1 for every round of every format.
    """
    prompt = corpus_prompt(engine, context_tokens, chunk_tokens)
    layout = engine.read(prompt)
    engine.add_chunks(prompt.chunks)
    results: list[LoadResult] = []
    generator = random.Random(0)
    for blob_format, is_encrypted in formats:
        with tempfile.TemporaryDirectory() as folder:
            key = os.urandom(32) if is_encrypted else None
            store = DiskStore(Path(folder), ram_bytes=0, blob_format=blob_format, encryption_key=key)
            blobs = _Blobs(store, layout, engine.identity.fingerprint)
            for chunk in layout.chunks:
                cache, _ = engine.store.get(chunk.key, fingerprint=blobs.fingerprint, input_ids=chunk.input_ids)
                if cache is not None:
                    store.put(chunk.key, cache, fingerprint=blobs.fingerprint)
            ways = [way for way in WAYS if not (is_encrypted and way in _OF_PLAIN_BLOBS)]
            times: dict[tuple[str, bool], list[tuple[float, float, float]]] = {}
            ttft: list[float] = []
            for round_number in range(-1, rounds):
                report = engine.prefill(prompt, strategy="prophetkv", recompute_ratio=ratio).report
                for is_cold in (False, True):
                    # A way that always followed the same other one would find the memory that that one left.
                    for way in generator.sample(ways, len(ways)):
                        found = _timed(engine, blobs, WAYS[way], is_cold=is_cold)
                        if round_number >= 0:
                            times.setdefault((way, is_cold), []).append(found)
                if round_number >= 0:
                    ttft.append(report.timings_s.ttft)
                on_step(1)
            name = f"{blob_format}, encrypted" if is_encrypted else blob_format
            nbytes = store.stats().nbytes
            store.close()
        for (way, is_cold), found_times in times.items():
            base = times["read", is_cold]
            load, total, cpu = (statistics.median(column) for column in zip(*found_times, strict=True))
            ratios = [
                [one[index] / other[index] for one, other in zip(found_times, base, strict=True)] for index in (1, 2)
            ]
            results.append(
                LoadResult(
                    context_tokens=context_tokens,
                    blob_format=name,
                    way=way,
                    is_cold=is_cold,
                    mbytes=nbytes / 1e6,
                    load_ms=1e3 * load,
                    total_ms=1e3 * total,
                    cpu_ms=1e3 * cpu,
                    ratio=statistics.median(ratios[0]),
                    cpu_ratio=statistics.median(ratios[1]),
                    share_of_ttft=load / statistics.median(ttft),
                )
            )
    engine.store.delete([chunk.key for chunk in layout.chunks])
    return results


def _timed(
    engine: ProphetKVEngine, blobs: _Blobs, way: Callable[[_Blobs], list[ChunkCache]], *, is_cold: bool
) -> tuple[float, float, float]:
    """Return seconds until the caches are there, and until they are assembled, and CPU seconds of both."""
    if is_cold:
        for path in blobs.paths():
            _advise(path, os.POSIX_FADV_DONTNEED)
    cpu, started = time.process_time(), time.perf_counter()
    caches = way(blobs)
    loaded = time.perf_counter()
    assemble_caches(
        engine.support,
        caches,
        [chunk.start for chunk in blobs.layout.chunks],
        blobs.layout.num_tokens,
        dtype=getattr(torch, engine.support.dtype),
        device=engine.model.device,
    )
    return loaded - started, time.perf_counter() - started, time.process_time() - cpu


def _advise(path: Path, advice: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, advice)
    finally:
        os.close(descriptor)
