"""Time to first token against full prefill (SDPA) on the same token ids, alternating in one process.

Absolute times mean little on a shared machine; the ratio of two neighbouring runs does. Peak memory is measured in a
process of its own per arm, since a process's peak never goes down (`memory.py`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.defaults import read_speeches
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.evaluation.quality.fidelity import Arm
from prophetkv_rag.evaluation.speed.flops import full_flops, reuse_flops
from prophetkv_rag.evaluation.speed.llama_cpp import GgufModel, llama_cpp_peers
from prophetkv_rag.evaluation.speed.peers import decode_seconds, transformers_peers
from prophetkv_rag.evaluation.speed.results import LoadingResult, PeerResult, TtftResult
from prophetkv_rag.evaluation.tasks.prompting import user_turn
from prophetkv_rag.prompt import Prompt
from prophetkv_rag.store.disk import DiskStore

QUESTION = "Answer from the speeches above in one sentence: how many planes shall be produced in 1942?"
RAM_BYTES = 8 << 30
"""Of the RAM tier that caches are read ahead into: more than any context here needs."""


@dataclass(frozen=True, slots=True)
class TtftMeasurement:
    """What was measured at one context length: every arm, every peer, and loading alone."""

    results: list[TtftResult]
    peers: list[PeerResult]
    loading: LoadingResult


def corpus_prompt(engine: ProphetKVEngine, context_tokens: int, chunk_tokens: int, *, skip: int = 0) -> Prompt:
    """Return a prompt of the shipped speeches, cut every `chunk_tokens` tokens, and a question.

    Real text, because what the question attends to decides the cost: on random tokens it picks late tokens, which see
    more keys than the average row. Speeches are repeated when they are too short.

    Args:
        engine: With a tokenizer.
        context_tokens: Tokens in all chunks together.
        chunk_tokens: Tokens per chunk.
        skip: Tokens of the corpus to leave out at the start.
    """
    text = "\n\n".join(read_speeches().values())
    corpus: list[int] = engine.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    corpus = (corpus * (1 + (skip + context_tokens) // len(corpus)))[skip : skip + context_tokens]
    chunks = [corpus[start : start + chunk_tokens] for start in range(0, context_tokens, chunk_tokens)]
    head, tail = user_turn(engine.tokenizer, "", f"\n\n{QUESTION}")
    return Prompt(head, chunks, tail)


def measure_ttft(
    engine: ProphetKVEngine,
    arms: Sequence[Arm],
    *,
    context_tokens: int,
    chunk_tokens: int = 256,
    repeats: int = 5,
    peers: bool = True,
    ggufs: Sequence[GgufModel] = (),
    on_step: Callable[[int], None] | None = None,
) -> TtftMeasurement:
    """Alternate full prefill, every arm from RAM and from a warm disk, and the peers, on one prompt.

    Every time is compared with the full prefill of its own round; the first round warms up.

    Args:
        engine: With a tokenizer; the chunks are added to its store, and removed again.
        arms: Strategies and ratios.
        context_tokens: Tokens in all chunks together.
        chunk_tokens: Tokens per chunk.
        repeats: Rounds after the first.
        peers: Whether to measure transformers' prefix reuse too.
        ggufs: What llama.cpp is to be measured on.
        on_step: Called with 1 after each round.

    Raises:
        InputError: If llama.cpp cannot load a file, or the file is another model's.
    """
    prompt = corpus_prompt(engine, context_tokens, chunk_tokens)
    layout = engine.read(prompt)
    results = [TtftResult(context_tokens, arm.strategy, arm.recompute_ratio) for arm in arms]
    loading = LoadingResult(context_tokens)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        others = transformers_peers(engine, prompt) if peers else []
        for gguf in ggufs:
            closing, found = llama_cpp_peers(engine, prompt, gguf)
            opened.enter_context(closing)
            others += found
        beside = [PeerResult(context_tokens, peer.name) for peer in others]
        # No RAM tier: every load reads, checks and decodes the files, which are in the page cache after the first.
        on_disk, read_ahead = (_engine_on_disk(engine, Path(folder), size) for size in (0, RAM_BYTES))
        opened.callback(on_disk.store.close)
        opened.callback(read_ahead.store.close)
        engine.add_chunks(prompt.chunks)
        on_disk.add_chunks(prompt.chunks)
        for repeat in range(-1, repeats):
            full = engine.prefill(prompt, strategy="full_prefill")
            full_s, full_decode = full.report.timings_s.ttft, decode_seconds(engine, full)
            first_token = int(full.logits[0].argmax())
            del full
            alone_s, ahead_s, background_s = loading_seconds(read_ahead, prompt)
            if repeat >= 0:
                loading.alone_s.append(alone_s)
                loading.ahead_s.append(ahead_s)
                loading.background_s.append(background_s)
            for arm, result in zip(arms, results, strict=True):
                ram = engine.prefill(prompt, strategy=arm.strategy, recompute_ratio=arm.recompute_ratio)
                decode = decode_seconds(engine, ram)
                disk = on_disk.prefill(prompt, strategy=arm.strategy, recompute_ratio=arm.recompute_ratio).report
                if repeat >= 0:
                    result.full_flops = full_flops(engine.model, engine.support, layout)
                    result.flops = reuse_flops(engine.model, engine.support, layout, ram.recomputed, ram.visible)
                    if ram.recomputed.numel():
                        result.mean_position = float(ram.recomputed.float().mean()) / layout.num_tokens
                    result.full_s.append(full_s)
                    result.ram_s.append(ram.report.timings_s.ttft)
                    result.disk_s.append(disk.timings_s.ttft)
                    result.decode_ratio.append(full_decode / decode)
                    stages = ram.report.to_dict()["timings_s"]
                    result.stages_s.append({**stages, "load_disk": disk.timings_s.load, "load_ahead": ahead_s})
            for peer, measured in zip(others, beside, strict=True):
                seconds = peer.seconds()
                if repeat >= 0:
                    measured.seconds.append(seconds)
                    measured.ratios.append(full_s / seconds)
                    measured.same_token.append(peer.first_token == first_token)
            if on_step is not None:
                on_step(1)
    engine.store.delete(engine.identity.key(chunk) for chunk in prompt.chunks if not isinstance(chunk, str))
    return TtftMeasurement(results, beside, loading)


def loading_seconds(engine: ProphetKVEngine, prompt: Prompt) -> tuple[float, float, float]:
    """Load a prompt's caches from the disk without running the model: without reading ahead, with it, and behind it.

    Args:
        engine: Its store is a `DiskStore` with a RAM tier, which is emptied before each of the three.
        prompt: Its chunks are stored.

    Returns:
        Seconds of loading alone; of loading when reading began just before the prompt was matched, as it does when a
        collection answers a query; and of reading ahead, to its end.
    """
    store = engine.store
    assert isinstance(store, DiskStore)
    keys = [chunk.key for chunk in engine.read(prompt).chunks]

    def empty() -> None:
        store.flush()  # a thread that still reads would fill the tier again
        store.drop_from_memory(keys)

    def load() -> float:
        layout = engine.read(prompt)
        started = time.perf_counter()
        engine.library.load(layout)
        return time.perf_counter() - started

    empty()
    alone = load()
    empty()
    store.read_ahead(keys, fingerprint=engine.identity.fingerprint)
    ahead = load()
    empty()
    started = time.perf_counter()
    store.read_ahead(keys, fingerprint=engine.identity.fingerprint)
    store.flush()
    return alone, ahead, time.perf_counter() - started


def _engine_on_disk(engine: ProphetKVEngine, folder: Path, ram_bytes: int) -> ProphetKVEngine:
    config = ProphetKVConfig(encoding_prefix=engine.identity.prefix_ids)
    store = DiskStore(folder, ram_bytes=ram_bytes)
    return ProphetKVEngine(engine.model, engine.tokenizer, config=config, store=store)
