"""`doctor` on models that can be used and one that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from prophetkv_rag.model.loading import load_model
from tests.cli.program import Run
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("offline")


def test_doctor_on_a_supported_model(run: Run, tiny_model: Path) -> None:
    report = run("doctor", tiny_model, "--json")
    assert report["supported"] is True
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 2]
    assert {"rope", "sliding_window", "max_error"} <= set(report["layers"][0])
    assert "is supported: llama, 3 layers" in run("doctor", tiny_model)


def test_a_terminal_shows_one_status_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    """rich refuses a second spinner inside the first."""
    from contextlib import contextmanager

    depth = 0

    @contextmanager
    def one_status(message: str) -> Any:
        nonlocal depth
        assert depth == 0, message
        depth += 1
        yield lambda text: None
        depth -= 1

    monkeypatch.setattr("prophetkv_rag.cli.doctor.status", one_status)
    monkeypatch.setattr("prophetkv_rag.cli.model_choice.status", one_status)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: None)
    monkeypatch.setattr(
        "prophetkv_rag.model.load_model",
        lambda name, load=load_model, **options: load(tiny_model) if name == "a/name" else None,
    )
    assert run("doctor", "a/name", "--json")["supported"] is True


def test_doctor_on_a_refused_model(run: Run, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=480, n_embd=32, n_layer=2, n_head=2, n_positions=512)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    report = run("doctor", tmp_path / "gpt2", "--json", status=1)
    assert report["supported"] is False
    assert "positions" in report["reason"]
    assert "is not supported: " in run("doctor", tmp_path / "gpt2", status=1)
