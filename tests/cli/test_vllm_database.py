"""Databases whose KV caches are vLLM's, where vLLM is not: what is refused, what is said, and the way back."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from prophetkv_rag.cli.database_settings import DatabaseSettings, find_settings, save_settings
from tests.cli.program import Run, index_tiny

pytestmark = pytest.mark.usefixtures("offline")

DATABASE = Path(".prophetkv")
AS_VLLM = {"engine": "vllm", "vllm_args": {"dtype": "float32"}, "behind_prompt": False, "cached_for": "f" * 64}


class WithoutVLLM:
    """An import system that finds no vLLM, wherever the test runs."""

    def find_spec(self, name: str, *arguments: object) -> None:
        """Raise what Python raises of a package that is not installed."""
        if name == "vllm":
            msg = "No module named 'vllm'"
            raise ModuleNotFoundError(msg, name=name)


def become_vllms(**more: object) -> None:
    """Have a database say that its caches are vLLM's."""
    found = find_settings(DATABASE) or DatabaseSettings("some/model", 64)
    save_settings(DATABASE, replace(found, **(AS_VLLM | more)))


@pytest.mark.parametrize(
    "command",
    [
        ("ask", "Who?"),
        ("calibrate", "--db", DATABASE),
        ("serve", "--engine", "transformers", "--port", 0),
        ("serve", "--engine", "transformers", "--port", 0, "--database", DATABASE),
    ],
)
def test_commands_of_transformers_say_what_to_do(fails: Run, command: tuple[object, ...]) -> None:
    become_vllms()
    said = fails(*command)
    assert "are vLLM's" in said
    assert f"index DIR --engine transformers --db {DATABASE}" in said


@pytest.mark.parametrize(
    "command", [("index", "docs"), ("serve", "--port", 0), ("cache", "warm"), ("cache", "warm", "--device", "cpu")]
)
def test_the_others_need_vllm(
    fails: Run, docs: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "meta_path", [WithoutVLLM(), *sys.meta_path])
    become_vllms()
    assert ("--device is not for" if "--device" in command else "prophetkv-rag[vllm]") in fails(*command)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--ray"], "tensor_parallel_size"),
        (["--fidelity", "0.95"], "transformers"),
        (["--lead-in", "docs/one.txt"], "--encoding"),
        (["--dtype", "float32"], "--vllm-args"),
        (["--device", "cpu"], "--vllm-args"),
        (["--remote", "memory://bucket"], "disk"),
        (["--cache-policy", "on_first_use"], "while it indexes"),
        (["--prompt-template", "missing"], "missing cannot be used: No such file"),
        (["--vllm-args", "[]"], "JSON object"),
        (["--vllm-args", '{"kv_transfer_config": {}}'], "without model and kv_transfer_config"),
    ],
)
def test_options_that_are_not_for_vllm(fails: Run, docs: Path, options: list[str], reason: str) -> None:
    said = fails("index", docs, "--engine", "vllm", *options)
    assert reason in said
    assert options[0].split("=")[0] in said
    assert not DATABASE.exists()


@pytest.mark.parametrize(
    ("remembered", "reason"),
    [({"remote": "memory://bucket"}, "--remote none"), ({"cache_policy": "on_first_use"}, "eager")],
)
def test_what_a_database_has_become_that_vllm_does_not_serve(
    fails: Run, docs: Path, remembered: dict[str, str], reason: str
) -> None:
    save_settings(DATABASE, replace(DatabaseSettings("some/model", 64), **remembered))
    assert reason in fails("index", docs, "--engine", "vllm")


def test_a_database_of_transformers_is_not_served_by_vllm(run: Run, fails: Run, docs: Path) -> None:
    assert index_tiny(run, docs)["engine"] == "transformers"
    assert "--vllm-args goes with --engine vllm" in fails("index", docs, "--vllm-args", "{}")
    assert "--prompt-template goes with --engine vllm" in fails("index", docs, "--prompt-template", "docs/one.txt")
    assert f"index DIR --engine vllm --db {DATABASE}" in fails("serve", "--engine", "vllm", "--port", 0)
    assert "allowed: transformers, vllm" in fails("index", docs, "--engine", "sglang")


def test_indexing_with_transformers_takes_a_database_back(run: Run, docs: Path) -> None:
    first = index_tiny(run, docs)
    become_vllms(prompt_template="Read:\n{context}", strategy="epic", recompute_ratio=0.5, dtype="auto")
    again = index_tiny(run, docs, "--engine", "transformers")
    assert (again["engine"], again["indexed"], again["caches"]) == ("transformers", [], first["caches"])
    settings = json.loads((DATABASE / "prophetkv-rag.json").read_text())
    assert (settings["engine"], settings["vllm_args"], settings["behind_prompt"]) == ("transformers", {}, True)
    assert settings["prompt_template"] is None
    assert (settings["strategy"], settings["recompute_ratio"]) == ("prophetkv", None)
    assert run("ask", "Who?", "--max-new-tokens", 1, "--json")["report"]["chunks"]


def test_databases_of_former_versions_are_transformers(tmp_path: Path) -> None:
    (tmp_path / "prophetkv-rag.json").write_text('{"model": "some/model", "chunk_size": 64}')
    settings = find_settings(tmp_path)
    assert settings is not None
    assert (settings.engine, settings.vllm_args) == ("transformers", {})
