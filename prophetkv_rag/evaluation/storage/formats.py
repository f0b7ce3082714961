"""What each blob format costs and saves: size, load time, and how far answers move from full prefill's.

Prompts are the shipped questions, each over the part of its speech that holds the answer. Every format is measured on
the very same caches, written and read back by a store on disk, so differences between rows are the format's alone.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prophetkv_rag.defaults import read_questions, read_speeches
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.quality.fidelity import Truth, compare, full_prefill
from prophetkv_rag.evaluation.tasks.prompting import user_turn
from prophetkv_rag.evaluation.tasks.questions import join_passages
from prophetkv_rag.prompt import Prompt
from prophetkv_rag.store.blobs import BlobFormat
from prophetkv_rag.store.disk import DiskStore


@dataclass(frozen=True, slots=True)
class FormatResult:
    """One format at one ratio, means over the prompts.

    Attributes:
        blob_format: Its name.
        recompute_ratio: Share of chunk tokens recomputed.
        bytes_per_token: On disk.
        load_ms_per_1000_tokens: Reading, checking and unpacking from a warm disk (median over the chunks).
        zstd_ratio: Size after zstd level 3 over size before; `None` where zstandard is not installed.
        kl: KL(full prefill || reuse) over full prefill's own answer, nats.
        kl_above_exact: Mean of the paired differences to the exact format's.
        top1_agreement: Share of answer positions with the same first choice as full prefill's.
    """

    blob_format: str
    recompute_ratio: float
    bytes_per_token: float
    load_ms_per_1000_tokens: float
    zstd_ratio: float | None
    kl: float
    kl_above_exact: float
    top1_agreement: float


def demo_prompts(engine: ProphetKVEngine, *, count: int, context_tokens: int, chunk_tokens: int) -> list[Prompt]:
    """Return prompts of shipped questions, each over the chunks around its answer.

    Raises:
        InputError: If there are not so many questions.
    """
    questions, speeches = read_questions(), read_speeches()
    if count > len(questions):
        msg = f"--prompts is {count}, but only {len(questions)} questions are shipped"
        raise InputError(msg)
    prompts = []
    for question in questions[:count]:
        chunks = join_passages(speeches[question.file].split("\n\n"), engine.tokenizer, chunk_tokens)
        place = next((i for i, chunk in enumerate(chunks) if question.expected[0] in chunk), 0)
        number = max(1, context_tokens // chunk_tokens)
        start = max(0, min(place - number // 2, len(chunks) - number))
        head, tail = user_turn(engine.tokenizer, "", f"\n\n{question.question} Answer in one sentence.")
        prompts.append(Prompt(head, chunks[start : start + number], tail))
    return prompts


def measure_formats(
    engine: ProphetKVEngine,
    prompts: Sequence[Prompt],
    formats: Sequence[BlobFormat],
    *,
    ratios: Sequence[float],
    answer_tokens: int = 32,
    on_step: Callable[[int], None] = lambda steps: None,
) -> list[FormatResult]:
    """Measure formats; `"exact"` must be the first, as the others are compared with it.

    Args:
        engine: Any engine of the model; its own store gets the prompts' chunks.
        prompts: With text chunks.
        formats: What to measure.
        ratios: Of chunk tokens recomputed, by ProphetKV (0: plain reuse).
        answer_tokens: Longest answer compared.
        on_step: Called with 1 for every prompt of every format, and for every full prefill.
    """
    truths: list[Truth] = []
    for prompt in prompts:
        engine.add_chunks(list(prompt.chunks))
        truths.append(full_prefill(engine, prompt, answer_tokens=answer_tokens))
        on_step(1)
    exact: dict[float, list[float]] = {}
    results = []
    for blob_format in formats:
        with tempfile.TemporaryDirectory() as folder:
            store = DiskStore(Path(folder), ram_bytes=0, blob_format=blob_format)
            measured = ProphetKVEngine(engine.model, engine.tokenizer, config=engine.config, store=store)
            size, load, zstd = _write_and_read(engine, measured, prompts)
            found: dict[float, list[tuple[float, float]]] = {ratio: [] for ratio in ratios}
            for prompt, truth in zip(prompts, truths, strict=True):
                for ratio in ratios:
                    prefill = measured.prefill(prompt, strategy="prophetkv", recompute_ratio=ratio)
                    fidelity = compare(measured, truth, prefill, score_tokens=answer_tokens)
                    found[ratio].append((fidelity.kl, fidelity.top1_agreement))
                on_step(1)
            store.close()
        for ratio, pairs in found.items():
            kls = [kl for kl, _ in pairs]
            base = exact.setdefault(ratio, kls)
            above = statistics.mean(kl - other for kl, other in zip(kls, base, strict=True))
            agreement = statistics.mean(agrees for _, agrees in pairs)
            results.append(FormatResult(blob_format, ratio, size, load, zstd, statistics.mean(kls), above, agreement))
    return results


def _write_and_read(
    source: ProphetKVEngine, target: ProphetKVEngine, prompts: Sequence[Prompt]
) -> tuple[float, float, float | None]:
    """Copy the prompts' caches; returns bytes a token, milliseconds per 1,000 tokens, and what zstd leaves."""
    fingerprint = source.identity.fingerprint
    store = target.store
    assert isinstance(store, DiskStore)
    times, before, after = [], 0, 0
    for prompt in prompts:
        for chunk in source.read(prompt).chunks:
            cache, _ = source.store.get(chunk.key, fingerprint=fingerprint, input_ids=chunk.input_ids)
            if cache is None:  # a store with a limit may have dropped it
                continue
            store.put(chunk.key, cache, fingerprint=fingerprint)
            started = time.perf_counter()
            store.get(chunk.key, fingerprint=fingerprint, input_ids=chunk.input_ids)
            times.append(1e6 * (time.perf_counter() - started) / len(chunk.input_ids))
            blob = store.files.path(chunk.key)
            smaller = _zstd_size(blob.read_bytes())
            before, after = before + blob.stat().st_size, after + (smaller or 0)
    stats = store.stats()
    return stats.nbytes / stats.tokens, statistics.median(times), after / before if after else None


def _zstd_size(data: bytes) -> int | None:
    try:
        import zstandard
    except ImportError:
        return None
    return len(zstandard.ZstdCompressor(level=3).compress(data))
