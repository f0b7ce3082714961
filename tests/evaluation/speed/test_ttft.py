"""The speed bench: what it counts is right, and its command says what it should (never how fast)."""

from __future__ import annotations

import json

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.cli.app import main
from prophetkv_rag.evaluation.speed.flops import full_flops, pass_flops, reuse_flops
from prophetkv_rag.evaluation.speed.peers import PrefixReuse, PrefixReuseOtherOrder, decode_seconds
from prophetkv_rag.evaluation.speed.ttft import corpus_prompt
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def engine():
    return ProphetKVEngine(tiny_llama(), tiny_tokenizer())


def test_operations_of_a_pass_by_hand():
    model = tiny_llama(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    engine = ProphetKVEngine(model, None)
    per_layer = 8 * 16 + 2 * (8 * 8) + 16 * 8 + 3 * 8 * 24  # q, k and v, o, mlp
    rows = torch.tensor([0, 5, 9])
    attention = 2 * 2 * 4 * 4 * (1 + 6 + 10)  # scores and values, 4 heads of 4
    assert pass_flops(model, engine.support, rows) == 2 * (2 * per_layer * 3 + attention)


def test_the_limit_counts_stage_one_and_the_rows_run(engine):
    prompt = corpus_prompt(engine, 300, 60)
    engine.add_chunks(prompt.chunks)
    layout = engine.read(prompt)
    result = engine.prefill(prompt, recompute_ratio=0.2)
    ours = reuse_flops(engine.model, engine.support, layout, result.recomputed)

    def of(positions):
        return pass_flops(engine.model, engine.support, torch.tensor(list(positions)))

    suffix = range(layout.suffix_start, layout.num_tokens)
    assert layout.known_prefix == layout.context_start  # the head is the encoding prefix
    assert ours == pytest.approx(of(suffix) + of([*suffix, *result.recomputed.tolist()]))
    assert full_flops(engine.model, engine.support, layout) == pytest.approx(of(range(layout.num_tokens)))
    # As many rows as the report says.
    rows = 2 * len(suffix) + len(result.recomputed)
    assert result.report.row_layers == rows * len(engine.support.layers)


def test_windows_bound_what_a_row_sees():
    from tests import families

    model = families.SUPPORTED["mistral"](sliding_window=4)
    support = ProphetKVEngine(model, None).support
    near, far = torch.arange(10, 12), torch.arange(60, 62)
    assert pass_flops(model, support, near) == pass_flops(model, support, far)


@pytest.mark.parametrize(("peer", "all_chunks"), [(PrefixReuse, True), (PrefixReuseOtherOrder, False)])
def test_a_peer_computes_the_same_prompt(engine, peer, all_chunks, monkeypatch):
    chunks = [[number] * 20 for number in range(20, 24)]
    prompt = Prompt([3, 4, 5], chunks, [7, 8, 9])
    monkeypatch.setattr(PrefixReuse, "earlier", lambda self, prompt: Prompt(prompt.prefix, prompt.chunks, [6, 8, 9]))
    one = peer(engine, prompt)
    assert one.num_shared == (83 if all_chunks else 3)
    full = engine.prefill(prompt, strategy="full_prefill")
    for _ in range(2):  # the second time from the same cache
        assert one.seconds() > 0
        assert one.first_token == int(full.logits.argmax())
        keys = one.cache.layers[-1].keys
        torch.testing.assert_close(keys, full.past_key_values.layers[-1].keys, atol=1e-5, rtol=1e-5)


def test_decoding_leaves_the_prefill_as_it_was(engine):
    result = engine.prefill("Some words to read.", strategy="full_prefill")
    before = result.past_key_values.layers[0].keys.clone()
    assert decode_seconds(engine, result) > 0
    assert torch.equal(before, result.past_key_values.layers[0].keys)


def test_the_command(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    plot = tmp_path / "new" / "ttft.png"
    arguments = ["bench", "ttft", "--model", str(model), "--context", "96", "--context", "160", "--chunk-tokens", "32"]
    arguments += ["--repeats", "1", "--no-memory", "--strategy", "prophetkv", "--strategy", "full_reuse"]
    arguments += ["--recompute-ratio", "0.2", "--recompute-ratio", "0.1", "--plot", str(plot)]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    arms = [(row["context_tokens"], row["strategy"], row["recompute_ratio"]) for row in report["ttft"]]
    each = [("prophetkv", 0.2), ("prophetkv", 0.1), ("full_reuse", 0.0)]
    assert arms == [(context, *arm) for context in (96, 160) for arm in each]
    for row in report["ttft"]:
        assert row["speedup_ram_min"] <= row["speedup_ram"] <= row["speedup_ram_max"]
        assert (0 < row["mean_position"] < 1) == (row["recompute_ratio"] > 0)
        assert row["limit"] == row["full_flops"] / row["flops"]
        assert row["share_of_limit"] == pytest.approx(row["speedup_ram"] / row["limit"])
        assert row["share_of_ratio"] == pytest.approx(row["speedup_ram"] * row["recompute_ratio"])
        assert row["full_prefill_s_min"] <= row["full_prefill_s"] <= row["full_prefill_s_max"]
        assert {"load", "load_disk", "load_ahead"} < set(row["stages_s"])
    limits = [row["limit"] for row in report["ttft"][:3]]
    assert limits == sorted(limits)  # the fewer rows, the higher
    peers = {row["peer"]: row for row in report["peers"]}
    assert list(peers)[:2] == ["prefix cache, same order", "prefix cache, other order"]
    for row in peers.values():
        assert row["same_first_token"]
        assert row["seconds"] > 0
    assert report["memory"] == []
    assert plot.stat().st_size > 5_000
    assert main(arguments) == 0
    assert "prefix cache, other order" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--strategy", "prophet"], "unknown strategy"),
        (["--strategy", "prophetkv@corpus"], "unknown encoding 'corpus'"),
        (["--plot", "/dev/null/x.png"], "cannot be written"),
    ],
)
def test_bad_input(more, message, capsys):
    assert main(["bench", "ttft", *more]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_an_encoding_prefix_with_a_lead_in_shares_the_opening():
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(lead_in="Some other words."))
    layout = engine.read(corpus_prompt(engine, 100, 50))
    assert layout.known_prefix == layout.context_start > 0
    assert not layout.exact_first_chunk
