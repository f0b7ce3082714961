"""Cost per extra context token: slopes by hand, and by counting, that reuse's grows no faster than full prefill's."""

from __future__ import annotations

import json

import pytest

from prophetkv_rag import ProphetKVEngine
from prophetkv_rag.cli.app import main
from prophetkv_rag.evaluation.speed.flops import full_flops, reuse_flops
from prophetkv_rag.evaluation.speed.growth import cost_per_token
from prophetkv_rag.evaluation.speed.results import TtftResult
from prophetkv_rag.evaluation.speed.ttft import _engine_on_disk, corpus_prompt, loading_seconds
from prophetkv_rag.store.disk.reader import BlobReader
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer


def row(tokens, full, ours, ratio=0.2):
    result = TtftResult(tokens, "prophetkv", ratio, full_flops=1e6 * full, flops=1e6 * ours)
    for noise in (0.9, 1.0, 1.2):
        result.full_s.append(full * noise)
        result.ram_s.append(ours * noise)
        result.disk_s.append(ours)
        result.decode_ratio.append(1.0)
        result.stages_s.append({})
    return result.to_dict()


def test_slopes_by_hand():
    rows = [row(2000, 20, 5), row(1000, 8, 2), row(4000, 60, 13), row(1000, 8, 1, ratio=0.1)]
    first, second = cost_per_token(rows)  # one context is no slope
    assert (first["from_tokens"], first["to_tokens"], second["from_tokens"], second["to_tokens"]) == (
        1000, 2000, 2000, 4000,
    )  # fmt: skip
    assert first["full_ms"] == pytest.approx(12)
    assert first["ms"] == pytest.approx(3)
    assert first["times_less"] == pytest.approx(4)
    assert first["full_ms_low"] == pytest.approx(20 * 0.9 - 8 * 1.2)
    assert first["full_ms_high"] == pytest.approx(20 * 1.2 - 8 * 0.9)
    assert first["full_mflop"] == pytest.approx(12e-3)
    assert first["ms_rise"] is None
    assert (second["full_ms"], second["ms"]) == pytest.approx((20, 4))
    # From the middle of the first step (1,500) to that of the second (3,000).
    assert (second["full_ms_rise"], second["ms_rise"]) == pytest.approx((8 / 1.5, 1 / 1.5))
    assert second["mflop_rise"] == pytest.approx(1e-3 / 1.5)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_reuse_grows_no_faster_than_full_prefill(ratio):
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    rows = []
    for context in (256, 512, 1024, 1600):
        prompt = corpus_prompt(engine, context, 64)
        engine.add_chunks(prompt.chunks)
        layout = engine.read(prompt)
        result = engine.prefill(prompt, recompute_ratio=ratio)
        # What is counted is what was run.
        fresh = layout.num_tokens - layout.num_chunk_tokens - layout.known_prefix
        assert result.report.row_layers == (2 * fresh + len(result.recomputed)) * len(engine.support.layers)
        found = row(context, 1, 1, ratio)
        found["full_flops"] = full_flops(engine.model, engine.support, layout)
        found["flops"] = reuse_flops(engine.model, engine.support, layout, result.recomputed)
        rows.append(found)
    steps = cost_per_token(rows)
    assert len(steps) == 3
    # Every fresh row sees each further key in both stages: scores and values, 3 layers of 4 heads of 16 dimensions.
    asking = 2 * fresh * (2 * 2 * 3 * 4 * 16) / 1e6
    for step in steps:
        # A selected row sees at most twice the keys of the average row.
        assert 0 < step["mflop"] <= 2 * ratio * step["full_mflop"] + asking
        assert step["mflop"] < step["full_mflop"]
    for step in steps[1:]:
        assert step["mflop_rise"] <= step["full_mflop_rise"]


def test_the_command_tells_it(tmp_path, capsys):
    arguments = ["bench", "ttft", "--model", str(save_tiny(tmp_path / "model")), "--chunk-tokens", "32", "--no-peers"]
    arguments += ["--context", "160", "--context", "96", "--context", "320", "--repeats", "1", "--no-memory"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    steps = [(step["from_tokens"], step["to_tokens"]) for step in report["cost_per_token"]]
    assert steps == [(96, 160), (160, 320)]
    assert [entry["context_tokens"] for entry in report["loading"]] == [160, 96, 320]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Cost of one more context token" in printed
    assert "160 to 320" in printed


def test_loading_is_measured_from_the_disk_and_ahead_of_the_query(tmp_path, monkeypatch):
    engine = _engine_on_disk(ProphetKVEngine(tiny_llama(), tiny_tokenizer()), tmp_path, 1 << 30)
    prompt = corpus_prompt(engine, 200, 50)
    engine.add_chunks(prompt.chunks)
    reads = []
    real = BlobReader.read

    def read(self, key, **more):
        reads.append(key)
        return real(self, key, **more)

    monkeypatch.setattr(BlobReader, "read", read)
    alone, ahead, background = loading_seconds(engine, prompt)
    assert min(alone, ahead, background) > 0
    assert 4 <= len(reads) <= 8  # alone every chunk is read by the query, ahead what was not there yet
    before = len(reads)
    engine.prefill(prompt)  # the last one has filled the RAM tier
    assert len(reads) == before
    engine.store.close()
