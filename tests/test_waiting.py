"""How threads wait is chosen where it still can be, never against the user's choice, and advised on where it cannot."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prophetkv_rag import ProphetKVEngine, waiting
from prophetkv_rag.waiting import POLICY, advise
from tests.tiny import tiny_llama, tiny_tokenizer


def policy_after(code: str, tmp_path: Path, **given: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in waiting._CHOICES}
    run = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}\nimport os; print(os.environ.get('{POLICY}'))"],
        env=environment | given,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_they_sleep_where_torch_is_not_loaded_yet(tmp_path: Path) -> None:
    assert policy_after("import prophetkv_rag", tmp_path) == "PASSIVE"
    assert policy_after("import prophetkv_rag.cli.app", tmp_path) == "PASSIVE"
    assert policy_after("import prophetkv_rag.server", tmp_path) == "PASSIVE"


def test_what_the_user_has_chosen_stays(tmp_path: Path) -> None:
    assert policy_after("import prophetkv_rag", tmp_path, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
    assert policy_after("import prophetkv_rag", tmp_path, GOMP_SPINCOUNT="1000") == "None"


def test_it_is_not_pretended_once_torch_is_loaded(tmp_path: Path) -> None:
    assert policy_after("import sys, types; sys.modules['torch'] = types; import prophetkv_rag", tmp_path) == "None"


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_has_advised", False)
    for name in waiting._CHOICES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize(("load", "level"), [(7.5, "WARNING"), (0.1, "INFO")])
def test_the_advice(load: float, level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    advise(1)
    assert caplog.records == []
    advise(2)
    advise(2)
    assert [record.levelname for record in caplog.records] == [level]
    assert "import prophetkv_rag before torch, or set OMP_WAIT_POLICY=PASSIVE" in caplog.text


@pytest.mark.usefixtures("undecided")
def test_an_engine_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("prophetkv_rag.engine.advise", asked.append)
    ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    assert len(asked) == 1


def test_no_advice_to_who_has_chosen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(waiting, "_has_advised", False)
    monkeypatch.setenv(POLICY, "ACTIVE")
    advise(2)
    assert caplog.records == []
