"""The command line on a tiny random model: what it prints, its exit statuses, and one clear line for every mistake."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from prophetkv_rag import __version__
from prophetkv_rag.cli.app import main
from prophetkv_rag.cli.database import Database
from prophetkv_rag.cli.indexing import IndexSummary, index_documents
from prophetkv_rag.defaults import speeches_directory
from prophetkv_rag.model.loading import load_model
from tests.tiny import save_tiny, save_tiny_encoder, text_of, tiny_tokenizer

REPORT_KEYS = {
    "strategy",
    "recompute_ratio",
    "prompt_tokens",
    "chunk_tokens",
    "reused_tokens",
    "recomputed_tokens",
    "fresh_tokens",
    "chunks",
    "timings_s",
}
TIMINGS = {"match", "load", "assemble", "score", "recompute", "suffix", "ttft"}

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def no_hub(self: object, repo_id: str, **options: object) -> None:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    msg = "no network"
    raise ConnectionError(msg)


@pytest.fixture(autouse=True)
def _offline(tiny_model: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default models are the tiny ones, the hub does not answer, and the working directory is empty."""
    monkeypatch.setattr("prophetkv_rag.defaults.fetch_default_model", lambda progress: tiny_model)
    monkeypatch.setattr("prophetkv_rag.defaults.fetch_embedding_model", lambda progress=None: tiny_encoder)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_hub)
    monkeypatch.setenv("PROPHETKV_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def docs() -> Path:
    directory = Path("docs")
    (directory / "deep").mkdir(parents=True)
    (directory / "one.txt").write_text(text_of(150, seed=1))
    (directory / "deep" / "two.md").write_text(text_of(100, seed=2) + "\r\nÜnïcode 日本 <|im_end|>")
    return directory


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the program and returns what it printed on standard output, as JSON if that was asked for."""

    def program(*arguments: object, status: int = 0) -> Any:
        returned = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert returned == status, output.err
        return json.loads(output.out) if "--json" in arguments else output.out

    return program


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the program, which must end with status 2 and one line of error, and returns that line."""

    def program(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        lines = [line for line in output.err.splitlines() if "error" in line]
        assert len(lines) == 1, output.err
        assert "Traceback" not in output.err
        return lines[0]

    return program


def index_tiny(run: Run, docs: Path, *more: object) -> dict[str, Any]:
    report: dict[str, Any] = run("index", docs, "--chunk-size", 64, "--json", *more)
    return report


# ---- index and ask --------------------------------------------------------------------------------------------------


def test_index_then_ask(run: Run, docs: Path) -> None:
    report = index_tiny(run, docs)
    assert report["indexed"] == ["deep/two.md", "one.txt"]
    assert report["new_chunks"] == report["total_chunks"] == report["caches"]["chunks"] > 4

    answer = run("ask", "What did people watch?", "--max-new-tokens", 4, "--json")
    assert set(answer) == {"answer", "sources", "report"}
    assert [set(source) for source in answer["sources"]] == [{"id", "text", "score"}] * 4
    assert set(answer["report"]) == REPORT_KEYS
    assert set(answer["report"]["timings_s"]) == TIMINGS
    assert [set(chunk) for chunk in answer["report"]["chunks"]] == [{"key", "tokens", "status", "tier"}] * 4
    assert {chunk["status"] for chunk in answer["report"]["chunks"]} == {"hit"}
    counts = answer["report"]
    assert counts["chunk_tokens"] == counts["reused_tokens"] + counts["recomputed_tokens"]
    assert counts["prompt_tokens"] == counts["chunk_tokens"] + counts["fresh_tokens"]


def test_ask_draws_the_prompt(run: Run, fails: Run, docs: Path) -> None:
    index_tiny(run, docs)
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


def test_chunks_are_encoded_behind_the_first_document(run: Run, fails: Run, docs: Path, tmp_path: Path) -> None:
    index_tiny(run, docs)
    settings = Path(".prophetkv") / "prophetkv-rag.json"
    first = json.loads(settings.read_text())
    assert first["lead_in"]
    assert (docs / "deep" / "two.md").read_bytes().decode().startswith(first["lead_in"])
    assert first["behind_prompt"]

    # Without one, all caches are computed again; the choice is remembered.
    for more in (("--lead-in", "none"), ()):
        index_tiny(run, docs, *more)
        without = json.loads(settings.read_text())
        assert without["lead_in"] == ""
        assert without["cached_for"] != first["cached_for"]

    other = tmp_path / "other.txt"
    other.write_text("Some other text of the collection.")
    index_tiny(run, docs, "--lead-in", other)
    assert json.loads(settings.read_text())["lead_in"] == other.read_text()
    answer = run("ask", "What did people watch?", "--max-new-tokens", 4, "--json")
    assert {chunk["status"] for chunk in answer["report"]["chunks"]} == {"hit"}
    assert "none.txt cannot be read" in fails("index", docs, "--lead-in", "none.txt")


def test_only_what_changed_is_indexed_again(run: Run, docs: Path) -> None:
    before = index_tiny(run, docs)
    again = index_tiny(run, docs)
    assert (again["indexed"], again["new_chunks"]) == ([], 0)
    assert again["unchanged"] == ["deep/two.md", "one.txt"]
    assert "2 files, skipped" in run("index", docs)

    (docs / "one.txt").write_text("Something else altogether stands here now, and it is short.")
    (docs / "three.txt").write_text(text_of(50, seed=3))
    (docs / "deep" / "two.md").unlink()
    after = index_tiny(run, docs)
    assert (after["indexed"], after["removed"]) == (["one.txt", "three.txt"], ["deep/two.md"])
    assert after["total_chunks"] == after["new_chunks"] < before["total_chunks"]
    assert after["caches"]["chunks"] == after["total_chunks"]
    sources = run("ask", "What stands here?", "--top-k", 50, "--max-new-tokens", 1, "--json")["sources"]
    assert len(sources) == after["total_chunks"]


def test_chunks_that_a_change_left_alone_keep_their_caches(run: Run, docs: Path) -> None:
    index_tiny(run, docs)
    blobs = {path: path.stat().st_mtime_ns for path in Path(".prophetkv/prophetkv").rglob("*.safetensors")}
    with (docs / "one.txt").open("a") as file:
        file.write("\n\n\n" + text_of(64, seed=9))
    index_tiny(run, docs)
    kept = [path for path, time in blobs.items() if path.exists() and path.stat().st_mtime_ns == time]
    assert len(kept) >= len(blobs) - 1


def test_an_interrupted_index_is_completed(run: Run, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prophetkv_rag.cli.indexing.NODES_PER_INSERT", 1)
    whole = index_tiny(run, docs, "--db", "whole")
    calls = 0

    def interrupting(advance: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    from contextlib import nullcontext

    with monkeypatch.context() as patched:
        patched.setattr("prophetkv_rag.cli.indexing.progress_bar", lambda *a: nullcontext(interrupting))
        run("index", docs, "--chunk-size", 64, status=130)
    finished = index_tiny(run, docs)
    assert finished["indexed"]
    assert finished["total_chunks"] == whole["total_chunks"] == finished["caches"]["chunks"]


def test_files_of_one_name_in_two_directories_are_two_files(run: Run, docs: Path) -> None:
    before = index_tiny(run, docs)
    other = Path("other")
    other.mkdir()
    (other / "one.txt").write_text((docs / "one.txt").read_text())  # the same text, so the same stamp
    (other / "two.txt").write_text(text_of(40, seed=8))
    both = index_tiny(run, other)
    assert (both["indexed"], both["removed"]) == (["one.txt", "two.txt"], [])
    assert both["total_chunks"] == before["total_chunks"] + both["new_chunks"]
    for directory in (docs, other):
        assert index_tiny(run, directory)["indexed"] == []
    (other / "one.txt").unlink()
    assert index_tiny(run, other)["removed"] == ["one.txt"]
    assert index_tiny(run, docs)["indexed"] == []


def test_an_interrupted_change_of_models_is_noticed(
    run: Run, docs: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prophetkv_rag.chroma import KVCachingCollection

    count = index_tiny(run, docs)["total_chunks"]
    other = save_tiny(tmp_path / "other", seed=5)
    proxies: list[KVCachingCollection] = []
    renew = KVCachingCollection._renew

    def interrupted(self: KVCachingCollection, stored: Any) -> None:
        proxies.append(self)
        if len(proxies) == 2:
            raise KeyboardInterrupt
        renew(self, stored)

    with monkeypatch.context() as patched:
        patched.setattr("prophetkv_rag.chroma.collection._QUERY_SIZE", 2)
        patched.setattr(KVCachingCollection, "_renew", interrupted)
        run("ask", "Who?", "--model", other, "--max-new-tokens", 1, status=130)
    assert proxies[0].progress is None
    # The first two chunks' caches are the other model's by now; the settings must not say that all are the first's.
    answer = run("ask", "Who?", "--model", tiny_model, "--top-k", 50, "--max-new-tokens", 1, "--json")
    assert [chunk["status"] for chunk in answer["report"]["chunks"]] == ["hit"] * count
    assert run("cache", "stats", "--json")["chunks"] == count


def test_what_is_no_text_file_is_left_out(run: Run, docs: Path) -> None:
    import os

    os.mkfifo(docs / "pipe")  # reading it would wait for somebody to write
    run("index", docs, "--chunk-size", 64, "--db", docs)
    report = run("index", docs, "--chunk-size", 64, "--db", docs, "--json")
    assert report["indexed"] == []
    assert report["skipped"]["pipe"] == "not a regular file"
    assert "prophetkv-rag.json" not in report["skipped"]
    report = index_tiny(run, docs, "--db", "elsewhere")  # another database's settings are no document either
    assert report["indexed"] == ["deep/two.md", "one.txt"]


def test_settings_are_remembered(run: Run, docs: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=5)
    index_tiny(run, docs, "--model", other)
    again = run("index", docs, "--json")
    assert (again["model"], again["chunk_size"], again["indexed"]) == (str(other), 64, [])
    resized = run("index", docs, "--chunk-size", 96, "--json")
    assert resized["indexed"] == ["deep/two.md", "one.txt"]
    assert resized["caches"]["chunks"] == resized["total_chunks"]


def test_another_model_on_ask_computes_the_caches_again(run: Run, docs: Path, tmp_path: Path) -> None:
    index_tiny(run, docs)
    other = save_tiny(tmp_path / "other", seed=5)
    for options in (["--model", other], []):
        answer = run("ask", "Who?", "--max-new-tokens", 1, "--json", *options)
        assert {chunk["status"] for chunk in answer["report"]["chunks"]} == {"hit"}
    assert run("cache", "verify", "--json")["orphans"] == []


def test_lost_caches_are_computed_again(run: Run, docs: Path) -> None:
    import shutil

    index_tiny(run, docs)
    shutil.rmtree(".prophetkv/prophetkv")
    answer = run("ask", "Who?", "--max-new-tokens", 1, "--json")
    assert len(answer["report"]["chunks"]) == 4


# ---- the other commands ---------------------------------------------------------------------------------------------


def test_cache_stats_and_verify(run: Run, docs: Path) -> None:
    report = index_tiny(run, docs)
    assert run("cache", "stats", "--json").items() >= report["caches"].items()
    assert f"{report['total_chunks']} chunks" in run("cache", "stats")
    assert run("cache", "verify", "--json")["checked"] == report["total_chunks"]
    blob = next(Path(".prophetkv").rglob("*.safetensors"))
    blob.write_bytes(blob.read_bytes()[:-3])
    (blob.parent / "junk").write_text("x")
    found = run("cache", "verify", "--json", status=1)
    assert (found["bad"], found["orphans"]) == ([blob.stem], ["junk"])
    assert "2 faults found: repaired" in run("cache", "verify", "--repair")
    answer = run("ask", "Who?", "--top-k", 50, "--max-new-tokens", 1, "--json")
    assert answer["answer"] is not None


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
        lambda name, load=load_model: load(tiny_model) if name == "a/name" else None,
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


def test_version_and_help(run: Run) -> None:
    assert run("--version") == f"prophetkv-rag {__version__}\n"
    for command in ((), ("index",), ("ask",), ("demo",), ("doctor",), ("cache",), ("cache", "verify")):
        assert "--help" in run(*command, "--help")


def no_time_at_all(index: Callable[..., IndexSummary]) -> Callable[..., IndexSummary]:
    def indexed(*arguments: Any, **options: Any) -> IndexSummary:
        summary = index(*arguments, **options)
        summary.seconds = 0.0
        return summary

    return indexed


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


def test_everything_printed_with_json_is_json(docs: Path, tiny_model: Path, tmp_path: Path) -> None:
    """In a process of its own, so that nothing a library prints is missed."""
    command = [sys.executable, "-m", "prophetkv_rag.cli.app", "doctor", str(tiny_model), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(result.stdout)["supported"] is True


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_missing_and_unsuitable_directories(fails: Run, docs: Path) -> None:
    assert "nowhere does not exist" in fails("index", "nowhere")
    assert "is not a directory" in fails("index", docs / "one.txt")
    Path("empty").mkdir()
    assert "holds no text files" in fails("index", "empty")
    (Path("empty") / "x.bin").write_bytes(b"\0\1")
    assert "x.bin: binary" in fails("index", "empty")
    assert not Path(".prophetkv").exists()


def test_a_database_that_is_not_there(fails: Run) -> None:
    for command in (("ask", "Who?"), ("cache", "stats"), ("cache", "verify", "--json")):
        assert "there is no database at .prophetkv; make one with: prophetkv-rag index DIR" in fails(*command)


def test_a_database_that_cannot_be_written(fails: Run, docs: Path) -> None:
    Path("file").write_text("x")
    assert "the database directory file/db cannot be used" in fails("index", docs, "--db", "file/db")
    assert "is not a directory" in fails("index", docs, "--db", "file")


def test_a_database_that_is_broken(fails: Run, run: Run, docs: Path) -> None:
    index_tiny(run, docs)
    settings = Path(".prophetkv/prophetkv-rag.json")
    settings.write_text("{")
    assert "prophetkv-rag.json cannot be read" in fails("ask", "Who?")


def test_unknown_models(fails: Run, run: Run, docs: Path) -> None:
    assert "there is no model 'no/such-model'" in fails("index", docs, "--model", "no/such-model")
    assert "there is no model 'not/a/name'" in fails("doctor", "not/a/name")
    assert "cannot load a model from" in fails("doctor", docs)
    index_tiny(run, docs)
    assert "there is no model 'no/such-model'" in fails("ask", "Who?", "--model", "no/such-model", "--json")
    save_tiny(Path("gone"))
    index_tiny(run, docs, "--model", "gone", "--db", "other")
    Path("gone").rename("moved")
    assert "/gone" in fails("ask", "Who?", "--db", "other")


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


def test_other_mistakes(fails: Run, run: Run, docs: Path) -> None:
    assert "the question is empty" in fails("ask", "  ")
    assert "Missing argument" in fails("ask")
    assert "No such command" in fails("answer")
    assert "Invalid value for '--chunk-size'" in fails("index", docs, "--chunk-size", 63)
    assert "context window of 2048" in fails("index", docs, "--chunk-size", 2048)


def test_a_prompt_longer_than_the_context_window(fails: Run, run: Run, docs: Path) -> None:
    index_tiny(run, docs)
    assert "context window" in fails("ask", "why " * 3000, "--max-new-tokens", 1)


def test_cache_gc_and_clear_and_warm(run: Run, docs: Path) -> None:
    count = index_tiny(run, docs)["total_chunks"]
    (usage,) = run("cache", "stats", "--json")["usage"]
    assert (usage["chunks"], usage["stored"], usage["missing_tokens"], usage["missing_s"]) == (count, count, 0, 0)
    assert "documents" in run("cache", "stats")
    stray = next(Path(".prophetkv").rglob("*.safetensors")).with_name("stray")
    stray.write_bytes(b"left by a crash")
    assert run("cache", "gc", "--grace", 0, "--json") == {
        "orphans": 1,
        "unreferenced": 0,
        "stale_references": 0,
        "freed_bytes": 15,
    }
    assert not stray.exists()
    assert run("cache", "clear", "--namespace", "other", "--json")["deleted"] == 0
    assert run("cache", "clear", "--all", "--json") == {"deleted": count, "chunks_left": 0, "nbytes_left": 0}
    assert list(Path(".prophetkv").rglob("*.safetensors")) == []
    assert run("cache", "warm", "--json")["computed"] == count
    assert run("cache", "warm", "--json")["computed"] == 0
    next(Path(".prophetkv").rglob("*.safetensors")).unlink()
    assert "1 caches computed" in run("cache", "warm")
    assert run("cache", "verify", "--json")["checked"] == count


def test_cache_export_and_import(run: Run, docs: Path, tmp_path: Path) -> None:
    count = index_tiny(run, docs)["total_chunks"]
    exported = tmp_path / "caches.tar"
    assert run("cache", "export", exported, "--json")["exported"] == count
    run("cache", "clear", "--all")
    data = bytearray(exported.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.tar").write_bytes(data)
    assert len(run("cache", "import", tmp_path / "damaged.tar", "--json", status=1)["refused"]) == 1
    report = run("cache", "import", exported, "--json")
    assert (report["added"], report["known"], report["refused"]) == (1, count - 1, [])
    assert run("cache", "warm", "--json")["computed"] == 0
    assert run("cache", "gc", "--grace", 0, "--json")["unreferenced"] == 0
    answer = run("ask", "Who?", "--max-new-tokens", 1, "--json")
    assert {chunk["status"] for chunk in answer["report"]["chunks"]} == {"hit"}


def test_a_limit_and_a_format_are_remembered(run: Run, docs: Path) -> None:
    whole = index_tiny(run, docs)
    limit = whole["caches"]["nbytes"] // 2
    run("cache", "clear", "--all")
    index_tiny(run, docs, "--cache-limit", limit, "--cache-format", "int8")
    run("cache", "warm")
    small = run("cache", "stats", "--json")
    assert small["limit"] == limit
    assert small["chunks"] == whole["caches"]["chunks"]
    assert small["nbytes"] < limit
    index_tiny(run, docs, "--cache-limit", "1e3", "--cache-policy", "on_first_use")
    answer = run("ask", "Who?", "--max-new-tokens", 1, "--json")
    assert len(answer["report"]["chunks"]) == 4


def test_a_remote_tier_that_is_gone_for_good_is_given_up(run: Run, fails: Run, docs: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    count = index_tiny(run, docs, "--remote", url)["total_chunks"]
    assert "other_remotes" not in run("cache", "gc", "--json")
    index_tiny(run, docs, "--remote", "none")
    run("cache", "clear", "--all")
    assert run("cache", "gc", "--json")["other_remotes"] == {url: 1}, "all of the model, at once"
    assert f"--give-up-remote {url} forgets them" in run("cache", "gc")
    assert f"known: {url}" in fails("cache", "gc", "--give-up-remote", "file:///elsewhere")
    assert "other_remotes" not in run("cache", "gc", "--give-up-remote", url, "--json")
    with sqlite3.connect(".prophetkv/prophetkv/catalog.sqlite") as catalog:
        left = [
            catalog.execute(f"SELECT count(*) FROM {table}").fetchone()
            for table in ("remotes", "remote_chunks", "remote_deletes")
        ]
    catalog.close()
    assert left == [(0,)] * 3
    assert len(list((tmp_path / "remote").rglob("*.safetensors"))) == count, "what is there stays there"
    assert "there is none" in fails("cache", "gc", "--give-up-remote", url)


def test_a_limit_of_each_namespace_is_remembered_and_told(run: Run, docs: Path) -> None:
    whole = index_tiny(run, docs)
    limit = whole["caches"]["nbytes"] // 2
    run("cache", "clear", "--all")
    index_tiny(run, docs, "--namespace-limit", limit)
    small = run("cache", "stats", "--json")
    assert (small["limit"], small["namespace_limit"]) == (None, limit)
    assert 0 < small["nbytes"] <= limit
    answer = run("ask", "Who?", "--max-new-tokens", 1, "--json")
    tiers = [chunk["tier"] for chunk in answer["report"]["chunks"]]
    assert set(tiers) <= {"disk", "ram", "computed"}
    stats = run("cache", "stats", "--json")
    assert sum(stats["hits_by_tier"].values()) == stats["counts"]["hits"] == len(tiers) - tiers.count("computed")
    (usage,) = stats["usage"]
    assert usage["missing_tokens"] > 0
    assert 0 < usage["next_chunk_s"] < usage["missing_s"]
    printed = run("cache", "stats")
    assert f"{limit / 1e6:,.1f} MB at most of each namespace" in printed
    assert "on disk" in printed
    assert "a chunk costs" in printed
    assert run("cache", "clear", "--namespace", "other", "--json").keys() == {"deleted", "chunks_left", "nbytes_left"}
    with sqlite3.connect(".prophetkv/prophetkv/catalog.sqlite") as catalog:
        catalog.execute("DELETE FROM identities")  # as after a catalog was lost whose blobs do not say it
    catalog.close()
    unknown = run("cache", "clear", "--namespace", "other", "--json")
    assert (unknown["deleted"], unknown["of_unknown_namespace"]) == (0, usage["chunks"])
    assert "may be of this namespace too" in run("cache", "clear", "--namespace", "other")


def test_a_remote_tier_is_remembered_shared_and_cleared(run: Run, docs: Path, tmp_path: Path) -> None:
    url, folder = f"file://{tmp_path}/remote", tmp_path / "remote"
    count = index_tiny(run, docs, "--remote", url, "--remote-limit", "1GB", "--remote-timeout", 5)["total_chunks"]
    blobs = [path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))]
    assert len(blobs) == count
    found = run("cache", "stats", "--json")["remote"]
    assert (found["url"], found["chunks"], found["max_bytes"], found["waiting"]) == (url, count, 10**9, 0)
    assert f"{count} of them in file://" in run("cache", "stats")

    run("index", docs, "--db", "other", "--chunk-size", 64, "--remote", url, "--json")
    assert run("cache", "stats", "--db", "other", "--json")["remote"]["all_hits"] == count, "nothing was computed"
    shutil.rmtree("other/prophetkv/blobs")
    answer = run("ask", "Who?", "--db", "other", "--max-new-tokens", 1, "--json")
    assert {chunk["status"] for chunk in answer["report"]["chunks"]} == {"hit"}

    assert run("cache", "verify", "--json")["remote_checked"] == count
    next(folder.rglob("*.safetensors")).write_bytes(b"spoilt")
    assert len(run("cache", "verify", "--json", status=1)["remote_bad"]) == 1
    assert "repaired" in run("cache", "verify", "--repair")
    assert run("cache", "push", "--json")["uploaded"] == 1
    assert "0 caches uploaded" in run("cache", "push")
    shutil.rmtree(".prophetkv/prophetkv")
    assert run("cache", "warm", "--json")["computed"] == 0, "they come from there"
    assert [path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))] == blobs

    report = run("cache", "gc", "--json")
    assert (report["remote_deleted"], report["remote_waiting"]) == (0, 0)
    report = run("cache", "clear", "--all", "--json")
    assert (report["deleted"], report["remote_waiting"]) == (count, 0)
    assert list(folder.rglob("*.safetensors")) == []
    index_tiny(run, docs, "--remote", "none")
    assert "remote" not in run("cache", "stats", "--json")


def test_encrypted_caches(run: Run, fails: Run, docs: Path, tmp_path: Path) -> None:
    old, new, exported = tmp_path / "old.key", tmp_path / "new.key", tmp_path / "caches.tar"
    key_id = run("cache", "new-key", old, "--json")["key_id"]
    assert run("cache", "new-key", new, "--json")["key_id"] != key_id
    assert "not written over" in fails("cache", "new-key", old)
    count = index_tiny(run, docs, "--key-file", old)["total_chunks"]
    blobs = list(Path(".prophetkv").rglob("*.safetensors"))
    assert {blob.read_bytes()[:8] for blob in blobs} == {b"PKVSEAL1"}
    answer = run("ask", "Who?", "--max-new-tokens", 1, "--json")  # the database remembers where the key is
    assert {chunk["status"] for chunk in answer["report"]["chunks"]} == {"hit"}
    assert run("cache", "verify", "--json")["bad"] == []
    assert run("cache", "export", exported, "--json")["exported"] == count

    assert run("cache", "rekey", "--key-file", new, "--json")["changed"] == count
    assert old.read_text().strip() not in Path(".prophetkv/prophetkv-rag.json").read_text()
    again = run("ask", "Who?", "--max-new-tokens", 1, "--json")
    assert again["answer"] == answer["answer"]
    assert {chunk["status"] for chunk in again["report"]["chunks"]} == {"hit"}
    run("cache", "clear", "--all")
    assert len(run("cache", "import", exported, "--json", status=1)["refused"]) == count
    assert run("cache", "import", exported, "--from-key-file", old, "--json")["added"] == count
    assert run("cache", "verify", "--json")["bad"] == []

    new.chmod(0o644)
    assert "chmod 600" in fails("ask", "Who?")
    new.unlink()
    for command in (["ask", "Who?"], ["cache", "verify"], ["cache", "warm"], ["cache", "import", exported]):
        assert "cannot read the key file" in fails(*command)
    assert run("cache", "stats", "--json")["chunks"] == count
    old.chmod(0o600)
    assert "are encrypted with the key" in fails("index", docs, "--key-file", old)
    assert "are encrypted with the key" in fails("index", docs, "--key-file", "none")
    assert run("cache", "clear", "--all", "--json")["deleted"] == count
    index_tiny(run, docs, "--key-file", "none")
    assert "either --from-key-file or" in fails("cache", "import", exported, "--from-plain", "--from-key-file", old)


def test_mistakes_with_caches_are_said_in_one_line(run: Run, fails: Run, docs: Path, tmp_path: Path) -> None:
    index_tiny(run, docs)
    assert "either --namespace NAME or --all" in fails("cache", "clear")
    assert "is there already" in fails("cache", "export", docs)
    assert "cannot read" in fails("cache", "import", docs / "none.tar")
    (tmp_path / "no.tar").write_bytes(b"x" * 2000)
    assert "cannot read" in fails("cache", "import", tmp_path / "no.tar")
    assert "is no size" in fails("index", docs, "--cache-limit", "much")
    assert "allowed: exact" in fails("index", docs, "--cache-format", "zip")
    assert "allowed: eager" in fails("index", docs, "--cache-policy", "never")
    assert "give a URL such as s3://" in fails("index", docs, "--remote", "bucket")
    assert "go with --remote URL" in fails("index", docs, "--remote-limit", "1GB")
    assert "has no remote tier" in fails("cache", "push")
    assert "goes with --cache-dir" in fails("serve", "--remote", "s3://bucket/prefix")
    assert "goes without a database" in fails("serve", "--cache-limit", "1GB", "--port", 0)
    assert "is no size" in fails("index", docs, "--namespace-limit", "much")
