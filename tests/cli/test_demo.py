"""`demo` on a tiny random model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag.cli.database import Database
from prophetkv_rag.cli.indexing import IndexSummary, index_documents
from prophetkv_rag.defaults import read_questions, speeches_directory
from tests.cli.program import Run

pytestmark = pytest.mark.usefixtures("offline")


def test_demo(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tiny model's answers are noise, but the path is the real one; the second run computes no cache."""
    monkeypatch.setattr("prophetkv_rag.cli.demo.MAX_NEW_TOKENS", 2)
    first = run("demo", "--json")
    assert first["indexing"]["computed_chunks"] == first["indexing"]["total_chunks"] > 100
    assert len(first["questions"]) == 6
    for question in first["questions"]:
        assert question["prophetkv"]["report"]["prompt_tokens"] == question["full_prefill"]["report"]["prompt_tokens"]
        assert question["prophetkv"]["sources"] == question["full_prefill"]["sources"]
        assert question["prophetkv"]["report"]["reused_tokens"] > 0
    assert {"machine", "model", "model_source", "versions"} <= set(first["conditions"])
    bring = Database.bring_caches_up_to_date
    monkeypatch.setattr(Database, "bring_caches_up_to_date", lambda self: (time.sleep(1), bring(self))[1])
    monkeypatch.setattr("prophetkv_rag.cli.indexing.index_documents", no_time_at_all(index_documents))
    assert run("demo", "--json")["indexing"]["seconds"] >= 1, "bringing the caches up to date counts"
    printed = run("demo")
    assert "KV caches reused from an earlier run, nothing computed" in printed
    assert "Time to first token" in printed

    # Installed elsewhere, it is the same corpus, and stands in the database once.
    elsewhere = tmp_path / "elsewhere"
    with speeches_directory() as speeches:
        shutil.copytree(speeches, elsewhere)
    monkeypatch.setattr("prophetkv_rag.defaults.speeches_directory", lambda: nullcontext(elsewhere))
    again = run("demo", "--json")["indexing"]
    assert (again["total_chunks"], again["computed_chunks"]) == (first["indexing"]["total_chunks"], 0)


def test_other_numbers_have_a_database_of_their_own(run: Run, monkeypatch: pytest.MonkeyPatch, docs: Path) -> None:
    monkeypatch.setattr("prophetkv_rag.defaults.speeches_directory", lambda: nullcontext(docs))
    monkeypatch.setattr("prophetkv_rag.defaults.read_questions", lambda of=read_questions: of()[:1])
    monkeypatch.setattr("prophetkv_rag.cli.demo.MAX_NEW_TOKENS", 1)
    whole, half, again = (run("demo", "--dtype", dtype, "--json") for dtype in ("float32", "bfloat16", "float32"))
    assert half["indexing"]["computed_chunks"] == half["indexing"]["total_chunks"] > 0
    assert half["indexing"]["caches"]["nbytes"] < 0.6 * whole["indexing"]["caches"]["nbytes"]
    assert again["indexing"]["computed_chunks"] == 0


def no_time_at_all(index: Callable[..., IndexSummary]) -> Callable[..., IndexSummary]:
    def indexed(*arguments: Any, **options: Any) -> IndexSummary:
        summary = index(*arguments, **options)
        summary.seconds = 0.0
        return summary

    return indexed
