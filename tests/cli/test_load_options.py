"""`--dtype` and `--device` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prophetkv_rag.cli.model_choice import load_options
from tests.cli.program import Run, index_tiny

pytestmark = pytest.mark.usefixtures("offline")


def test_a_database_remembers_its_dtype(run: Run, docs: Path) -> None:
    first = index_tiny(run, docs)["caches"]["nbytes"]
    half = index_tiny(run, docs, "--dtype", "bfloat16")
    assert half["caches"]["nbytes"] < 0.8 * first  # all are computed again, in half the bytes
    assert half["new_chunks"] == 0
    settings = json.loads((Path(".prophetkv") / "prophetkv-rag.json").read_text())
    assert settings["dtype"] == "bfloat16"
    answer = run("ask", "Who?", "--strategy", "epic", "--device", "cpu", "--max-new-tokens", 1, "--json")
    assert [chunk["status"] for chunk in answer["report"]["chunks"]].count("hit") >= 3


def test_doctor_says_what_it_computes_in(run: Run, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run("doctor", tiny_model, "--dtype", "bfloat16", "--device", "cpu", "--json")
    assert (report["dtype"], report["device"]) == ("bfloat16", "cpu")
    load_options("float16", "cpu")
    assert "slower than float32" in capsys.readouterr().err
    load_options(None, "auto")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "command", [("index", "docs"), ("serve", "--port", 0), ("doctor", "x"), ("bench", "ttft"), ("demo",)]
)
def test_bad_values_are_refused_before_anything_is_fetched(
    fails: Run, docs: Path, command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*arguments: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr("prophetkv_rag.cli.model_choice.chosen_model", fetch)
    assert "the device is 'cuda:77'; here are: cpu" in fails(*command, "--device", "cuda:77")
    assert "the dtype is 'fp8'; allowed: auto, float32" in fails(*command, "--dtype", "fp8")


def test_vllm_has_settings_of_its_own(fails: Run, tiny_model: Path) -> None:
    assert "--vllm-args" in fails("doctor", tiny_model, "--engine", "vllm", "--dtype", "float16")
