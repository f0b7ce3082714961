"""The whole engine on the kernels against the whole engine on PyTorch: same tokens picked, same caches, same logits.

Run as `triton_cases.py`. On a GPU nothing is forced: that CUDA tensors take the kernels is part of what is tested.
"""

from __future__ import annotations

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.evaluation.speed.kernel_bench import count_lines, measure_kernels
from prophetkv_rag.evaluation.speed.kernel_works import Shape
from prophetkv_rag.kernels import ops, switch, triton
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.packed_cache import PackedRows
from tests import families
from tests.kernels.triton_cases import DEVICE, IS_INTERPRETED

PREFIX = (3, 1, 4, 1, 5)
# Rotation in halves, partial, interleaved; windows; soft-capping; sinks.
FAMILIES = ["llama", "stablelm", "cohere", "gemma2", "gpt_oss"]
LAUNCHERS = ["rope_gather", "rope_scatter", "selected_rows_attention", "attend_and_score", "rotate"]


def draw(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, families.VOCAB_SIZE, (count,), generator=generator).tolist()


CHUNKS = [draw(20, 1), draw(17, 2), draw(23, 3)]
PROMPT = Prompt(PREFIX, CHUNKS, draw(9, 5), glue=draw(3, 4))


@pytest.fixture
def launched(monkeypatch):
    """How often each launcher ran; falling back to PyTorch is an error."""
    counts = dict.fromkeys(LAUNCHERS, 0)

    def counting(name, run):
        def counted(*args, **options):
            counts[name] += 1
            return run(*args, **options)

        return counted

    for name in LAUNCHERS:
        monkeypatch.setattr(triton, name, counting(name, getattr(triton, name)))

    def refuse(reason):
        raise AssertionError(reason)

    monkeypatch.setattr(switch, "say_once", refuse)
    return counts


def engine_of(family: str, store: DiskStore | None = None, **settings: str) -> ProphetKVEngine:
    model = families.SUPPORTED[family]().to(DEVICE)
    return ProphetKVEngine(model, None, config=ProphetKVConfig(encoding_prefix=PREFIX, **settings), store=store)


@pytest.mark.parametrize("family", FAMILIES)
def test_engine(family, launched):
    choice = "triton" if IS_INTERPRETED else "auto"
    with ops.force("reference"):
        engine = engine_of(family)
        engine.add_chunks(CHUNKS)
        full = engine.prefill(PROMPT, strategy="full_prefill")
    arms = [("prophetkv", 0.3), ("prophetkv:context_share=0.4", 0.3), ("full_reuse", 0.0)]
    if family == "llama":
        arms += [("kvshare", 0.3), ("infoflow", 0.3), ("prophetkv", 1.0)]
    for strategy, ratio in arms:
        with ops.force("reference"):
            expected = engine.prefill(PROMPT, strategy=strategy, recompute_ratio=ratio)
        assert not any(launched.values())
        with ops.force(choice):
            found = engine.prefill(PROMPT, strategy=strategy, recompute_ratio=ratio)
        assert launched["rope_gather"] == len(engine.support.layers)
        assert launched["rope_scatter"] >= len(engine.support.layers)
        assert launched["selected_rows_attention"] > 0
        # InfoFlow's norm is made of rows' log-sum-exps.
        assert bool(launched["attend_and_score"]) == (0 < ratio < 1 and strategy != "infoflow")
        launched.update(dict.fromkeys(launched, 0))
        assert torch.equal(found.recomputed, expected.recomputed)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
        for own, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close(own.keys, other.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(own.values, other.values, atol=1e-4, rtol=1e-4)
        if ratio == 1.0:
            torch.testing.assert_close(found.logits, full.logits, atol=1e-4, rtol=1e-4)


def test_encoding_and_the_full_row_softmax(launched):
    """Chunks that the kernels encode are those that PyTorch encodes; stage I over everything that a row sees."""
    layouts, results = [], []
    for choice in ("reference", "triton" if IS_INTERPRETED else "auto"):
        with ops.force(choice):
            engine = engine_of("gemma2", score_softmax="full_row")
            engine.add_chunks(CHUNKS)
            layouts.append(engine.library.load(engine.read(PROMPT)).caches)
            results.append(engine.prefill(PROMPT, recompute_ratio=0.3))
    assert launched["rotate"] > 0
    for own, other in zip(*layouts, strict=True):
        for a, b in zip((*own.keys, *own.values), (*other.keys, *other.values), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert torch.equal(results[0].recomputed, results[1].recomputed)


@pytest.mark.parametrize("blob_format", ["int8", "fp8"])
def test_packed_caches_go_to_the_kernel_as_they_are(blob_format, launched, tmp_path, monkeypatch):
    """From the disk to the kernel nothing is unpacked; what comes out is what PyTorch makes of unpacked caches."""
    results = []
    for choice in ("reference", "triton" if IS_INTERPRETED else "auto"):
        store = DiskStore(tmp_path, blob_format=blob_format)
        with ops.force("reference"):
            engine = engine_of("llama", store=store)
            engine.add_chunks(CHUNKS)
        if choice != "reference":
            store.files.keeps_packed = True
            monkeypatch.setattr(PackedRows, "unpack", None)
        with ops.force(choice):
            results.append(engine.prefill(PROMPT, recompute_ratio=0.3))
        assert {chunk.status for chunk in results[-1].report.chunks} == {"hit"}
        store.close()
    assert launched["rope_gather"] == len(engine.support.layers)
    expected, found = results
    assert torch.equal(found.recomputed, expected.recomputed)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    for own, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(own.keys, other.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(own.values, other.values, atol=1e-4, rtol=1e-4)


def test_the_bench_runs_everything_it_times():
    """With a timer that only runs: on a machine without a GPU, nothing else of the bench would be executed."""
    runs = []

    def count(function):
        runs.append((function(), function()))
        return [2.0, 1.0, 3.0]

    shape = Shape(heads=4, kv_heads=2, head_dim=64, keys=256, rows=20, question=8, chunk=64, dtype="float32")
    report = measure_kernels(shape, device=DEVICE, timer=count, ceiling_size=64)
    assert len(runs) == 2 + len(report["kernels"]) == 2 + count_lines(shape)
    assert {row["variant"] for row in report["kernels"]} == {
        "Triton", "PyTorch", "SDPA with a mask", "FlexAttention", "SDPA of all rows",
    }  # fmt: skip
    for row in report["kernels"]:
        assert row["ms"] == 2.0
        assert row["share_of_roofline"] == pytest.approx(row["limit_ms"] / 2)
        assert row["gigabytes"] > 0
    # All ways of one attention come to one result.
    own, torch_way, masked, flex = (runs[2 + i][0] for i in range(4))
    for other in (torch_way, masked[0].transpose(0, 1), flex[0].transpose(0, 1)):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)
