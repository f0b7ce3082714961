"""`ask` on a tiny random model: answers, reports, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.program import Run, index_tiny
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("offline")


REPORT_KEYS = {
    "strategy",
    "recompute_ratio",
    "prompt_tokens",
    "chunk_tokens",
    "reused_tokens",
    "recomputed_tokens",
    "fresh_tokens",
    "remembered_tokens",
    "moved_tokens",
    "chunks",
    "timings_s",
}


TIMINGS = {"match", "load", "assemble", "score", "recompute", "suffix", "ttft"}


def test_index_then_ask(run: Run, docs: Path) -> None:
    report = index_tiny(run, docs, "--encoding", "plain")  # a chunk's one cache serves wherever it stands
    assert report["indexed"] == ["deep/two.md", "one.txt"]
    assert report["new_chunks"] == report["total_chunks"] == report["caches"]["chunks"] > 4

    answer = run("ask", "What did people watch?", "--max-new-tokens", 4, "--json")
    assert set(answer) == {"answer", "sources", "report"}
    assert [set(source) for source in answer["sources"]] == [{"id", "text", "score"}] * 4
    assert set(answer["report"]) == REPORT_KEYS
    assert set(answer["report"]["timings_s"]) == TIMINGS
    assert [set(chunk) for chunk in answer["report"]["chunks"]] == [{"key", "tokens", "status", "tier", "behind"}] * 4
    assert {chunk["status"] for chunk in answer["report"]["chunks"]} == {"hit"}
    counts = answer["report"]
    assert counts["chunk_tokens"] == counts["reused_tokens"] + counts["recomputed_tokens"]
    assert counts["prompt_tokens"] == counts["chunk_tokens"] + counts["fresh_tokens"]


def test_ask_draws_the_prompt(run: Run, fails: Run, docs: Path) -> None:
    index_tiny(run, docs, "--encoding", "plain")
    file = Path("drawn.html")
    options = ("--html", file, "--max-new-tokens", 2, "--top-k", 2)
    answer = run("ask", "What did <people> watch?", *options, "--json")
    page = file.read_text("utf-8")
    assert page.startswith("<!doctype html>")
    assert "What did &lt;people&gt; watch?" in page
    assert f"{answer['report']['reused_tokens']:,} reused" in page
    assert page.count("<span>from cache</span>") == len(answer["report"]["chunks"])
    assert 'class="r ' in page
    assert "is a directory" in fails("ask", "Who?", "--html", docs)
    assert "there is no directory missing" in fails("ask", "Who?", "--html", "missing/drawn.html")


def test_options_of_ask_reach_the_engine(run: Run, docs: Path) -> None:
    index_tiny(run, docs)
    options = ("--top-k", 2, "--strategy", "full_prefill", "--max-new-tokens", 3, "--json")
    full = run("ask", "Who?", *options)
    assert len(full["sources"]) == 2
    assert (full["report"]["strategy"], full["report"]["reused_tokens"]) == ("full_prefill", 0)
    everything = run("ask", "Who?", "--top-k", 2, "--recompute-ratio", 1, "--max-new-tokens", 3, "--json")
    assert everything["report"]["recomputed_tokens"] == everything["report"]["chunk_tokens"]
    assert everything["answer"] == full["answer"]


def test_text_output(run: Run, docs: Path) -> None:
    printed = run("index", docs, "--chunk-size", 64)
    assert "indexed  deep/two.md" in printed
    assert "Next: prophetkv-rag ask" in printed
    printed = run("ask", "What did people watch?", "--max-new-tokens", 3)
    assert "[1] " in printed
    assert "prompt tokens" in printed


def test_another_model_on_ask_computes_the_caches_again(run: Run, docs: Path, tmp_path: Path) -> None:
    index_tiny(run, docs)
    other = save_tiny(tmp_path / "other", seed=5)
    for options in (["--model", other], []):
        answer = run("ask", "Who?", "--max-new-tokens", 1, "--strategy", "epic", "--json", *options)
        assert {chunk["status"] for chunk in answer["report"]["chunks"]} == {"hit"}
    assert run("cache", "verify", "--json")["orphans"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recompute-ratio", "1.5"], "Invalid value for '--recompute-ratio'"),
        (["--recompute-ratio", "lots"], "Invalid value for '--recompute-ratio'"),
        (["--top-k", "0"], "Invalid value for '--top-k'"),
        (["--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["--strategy", "magic"], "'magic'; allowed: "),
        (["--nonsense"], "No such option"),
    ],
)
def test_options_out_of_range(options: list[str], message: str, fails: Run, run: Run, docs: Path) -> None:
    index_tiny(run, docs)
    assert message in fails("ask", "Who?", *options)


def test_a_prompt_longer_than_the_context_window(fails: Run, run: Run, docs: Path) -> None:
    index_tiny(run, docs)
    assert "context window" in fails("ask", "why " * 3000, "--max-new-tokens", 1)
