"""llama.cpp's keys, moved by hand: two programs that share nothing must do the same damage to the same prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVEngine
from prophetkv_rag.cli.app import main
from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.speed import GgufModel, measure_cache_reuse, why_not_llama_cpp, write_gguf
from prophetkv_rag.evaluation.speed.cache_reuse import open_cache
from tests.tiny import save_tiny, text_of, tiny_llama, tiny_tokenizer

needs_llama_cpp = pytest.mark.skipif(why_not_llama_cpp() is not None, reason=str(why_not_llama_cpp()))
MODEL = tiny_llama()


def prompt_of(seed: int) -> Prompt:
    chunks = [text_of(30, seed=seed + number) for number in range(3)]
    return Prompt("<|im_start|>user\nContext:\n", chunks, "\nWhat did people watch?<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture
def gguf(tmp_path: Path) -> GgufModel:
    write_gguf(MODEL, tmp_path / "tiny.gguf")
    return GgufModel("F32", tmp_path / "tiny.gguf", exact=True)


@needs_llama_cpp
def test_moved_keys_do_what_our_plain_reuse_does(gguf: GgufModel) -> None:
    """Theirs against their full prefill, ours against ours: one number, as neither corrects anything."""
    engine = ProphetKVEngine(MODEL, tiny_tokenizer())
    prompts = [prompt_of(10), prompt_of(20)]
    rows = {
        (row.name, row.recompute_ratio): row
        for row in measure_cache_reuse(engine, prompts, gguf, ratios=[0.0, 1.0], answer_tokens=8)
    }
    moved = rows["llama.cpp, every chunk from a prompt of its own", 0.0]
    ours = rows["ours, full_reuse", 0.0]
    assert ours.kl > 1e-3
    assert abs(moved.kl - ours.kl) < 0.01 * ours.kl
    assert moved.top1_agreement == ours.top1_agreement
    assert 0 < rows["llama.cpp, the chunk before the first gone", 0.0].kl < ours.kl
    assert rows["ours, prophetkv", 1.0].kl < 1e-6  # the control
    assert {row.prompts for row in rows.values()} == {2}


@needs_llama_cpp
def test_its_full_prefill_is_the_models_own_and_nothing_moved_changes_nothing(gguf: GgufModel) -> None:
    engine = ProphetKVEngine(MODEL, tiny_tokenizer())
    layout = engine.read(prompt_of(30))
    with open_cache(engine, gguf, 1000) as cache, torch.no_grad():
        full = cache.full(layout)
        expected = MODEL(layout.input_ids[None]).logits[0, -1:].double()
        assert torch.allclose(full, expected, atol=1e-4)
        assert torch.allclose(cache.one_gone(layout, []), full, atol=1e-5)
        assert torch.equal(cache.full(layout), full)  # what was moved before leaves nothing behind
    with pytest.raises(InputError, match="two prompts or more"):
        measure_cache_reuse(engine, [prompt_of(1)], gguf, ratios=[0.0])


def test_what_cannot_be_measured_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(save_tiny(tmp_path / "model"))

    def said(*arguments: object) -> str:
        assert main(["bench", "reuse", "--model", model, *map(str, arguments)]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        return output.err

    assert "--peer is 'vllm'; allowed: llama.cpp" in said("--peer", "vllm")
    assert "--peer" in said()
    with monkeypatch.context() as patched:
        patched.setattr("prophetkv_rag.evaluation.speed.why_not_llama_cpp", lambda: "llama-cpp-python is not installed")
        assert "--peer llama.cpp: llama-cpp-python is not installed" in said("--peer", "llama.cpp")
    monkeypatch.setattr("prophetkv_rag.evaluation.speed.why_not_llama_cpp", lambda: None)
    assert "--gguf: no file nowhere.gguf" in said("--peer", "llama.cpp", "--gguf", "nowhere.gguf")
    monkeypatch.setattr(
        "prophetkv_rag.evaluation.speed.why_not_gguf", lambda model: "models of type 'x' are not written"
    )
    assert "are not written; give the model's GGUF file by --gguf" in said("--peer", "llama.cpp")
