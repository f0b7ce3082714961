"""What `index` and `serve` say of caches before they begin, and what comes of it; and when they do not begin."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag.cli.console import shown_bytes, shown_duration
from prophetkv_rag.cli.serving import ServedCaches, open_served
from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.errors import InputError
from prophetkv_rag.store.disk import room
from tests.cli.program import Run, index_tiny
from tests.tiny import save_tiny, text_of

pytestmark = pytest.mark.usefixtures("offline")
SETTINGS = Path(".prophetkv") / "prophetkv-rag.json"


def have_free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Let the file system say that so much is free; nothing else of it changes."""
    usage = room.shutil.disk_usage(Path.cwd())
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage._replace(free=nbytes))


@pytest.fixture
def more_docs(docs: Path) -> Path:
    (docs / "long.txt").write_text(text_of(1200, seed=7))
    return docs


@pytest.mark.parametrize(
    ("options", "part"),
    # A header names all chunks that stood before it in its file: much beside the caches of so small a model.
    [(("--encoding", "plain"), 0.01), (("--cache-format", "int8"), 0.15)],
)
def test_what_is_planned_is_what_comes_of_it(run: Run, more_docs: Path, options: tuple[str, ...], part: float) -> None:
    report = index_tiny(run, more_docs, *options)
    planned, caches = report["planned"], report["caches"]
    assert (planned["chunks"], planned["tokens"]) == (caches["chunks"], caches["tokens"])
    assert abs(planned["nbytes"] - caches["nbytes"]) < part * caches["nbytes"]
    assert planned["seconds"] > 0
    assert planned["may_double"] is ("plain" not in options)
    nothing = {"chunks": 0, "tokens": 0, "nbytes": 0, "seconds": None, "may_double": False}
    assert index_tiny(run, more_docs)["planned"] == nothing


def test_only_what_is_missing_is_planned_and_by_the_measured_speed(run: Run, docs: Path) -> None:
    before = index_tiny(run, docs)
    assert before["planned"]["seconds"] is None  # measuring so little would be a good part of the work
    with (docs / "one.txt").open("a") as file:
        file.write("\n\n\n" + text_of(64, seed=9))
    report = index_tiny(run, docs)
    assert 0 < report["planned"]["chunks"] < report["new_chunks"]  # the file's other chunks are as they were
    assert report["planned"]["seconds"] > 0  # told by the first run


def test_a_new_database_takes_half_of_what_is_free_and_remembers_it(
    run: Run, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_free(monkeypatch, 40_000_000)
    report = index_tiny(run, docs)
    assert (report["cache_limit"], report["limit_chosen"]) == (20_000_000, True)
    have_free(monkeypatch, 90_000_000)
    assert index_tiny(run, docs)["cache_limit"] == 20_000_000
    assert run("cache", "stats", "--json")["limit"] == 20_000_000
    report = index_tiny(run, docs, "--cache-limit", "none")
    assert (report["cache_limit"], report["limit_chosen"]) == (None, False)
    assert index_tiny(run, docs)["cache_limit"] is None
    assert index_tiny(run, docs, "--db", "other", "--cache-limit", "2GB")["cache_limit"] == 2_000_000_000


def test_a_database_of_before_keeps_to_no_limit(run: Run, docs: Path) -> None:
    index_tiny(run, docs)
    settings = json.loads(SETTINGS.read_text())
    del settings["cache_limit"], settings["limit_chosen"]
    SETTINGS.write_text(json.dumps(settings))
    assert index_tiny(run, docs)["cache_limit"] is None


def test_documents_that_do_not_fit_are_not_begun(
    run: Run, fails: Run, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = index_tiny(run, docs, "--db", "elsewhere")["caches"]["nbytes"]
    have_free(monkeypatch, needed)
    said = fails("index", docs, "--chunk-size", 64)
    assert "12 chunks of 511 tokens need 408 kB, and 205 kB are left of the limit of 205 kB" in said
    assert abs(needed - 408_000) < 0.01 * needed
    assert "chosen as half of what was free" in said
    assert not SETTINGS.exists()  # it begins anew next time
    assert not list(Path(".prophetkv").rglob("*.safetensors"))
    for advice in re.findall(r"\((--cache-limit \w+|--cache-policy \w+)\)", said):
        index_tiny(run, docs, "--db", advice.split()[1], *advice.split())
    (more,) = re.findall(r"more room \(--cache-limit (\S+)\)", said)
    assert run("cache", "stats", "--db", more, "--json")["nbytes"] == needed


def test_documents_that_do_not_fit_any_more(run: Run, fails: Run, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = index_tiny(run, docs, "--db", "elsewhere")["caches"]["nbytes"]
    have_free(monkeypatch, round(2.5 * needed))
    before = index_tiny(run, docs)
    (docs / "more.txt").write_text(text_of(300, seed=21))
    assert "left of the limit" in fails("index", docs)
    assert run("cache", "stats", "--json")["chunks"] == before["caches"]["chunks"]
    assert SETTINGS.exists()
    assert index_tiny(run, docs, "--cache-limit", "1GB")["indexed"] == ["more.txt"]


def test_a_disk_that_is_too_small(run: Run, fails: Run, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = index_tiny(run, docs, "--db", "elsewhere")["caches"]["nbytes"]
    have_free(monkeypatch, needed // 2)
    said = fails("index", docs, "--chunk-size", 64, "--cache-limit", "none")
    assert "are free at .prophetkv" in said
    assert "free" in fails("index", docs, "--chunk-size", 64, "--cache-limit", "1GB")


def test_a_limit_set_on_purpose_and_caches_of_later_are_only_told(
    run: Run, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = index_tiny(run, docs, "--db", "elsewhere")["caches"]["nbytes"]
    have_free(monkeypatch, needed)
    limited = index_tiny(run, docs, "--cache-limit", needed // 2)
    assert 0 < limited["caches"]["nbytes"] <= needed // 2
    later = index_tiny(run, docs, "--db", "later", "--cache-policy", "on_first_use")
    assert (later["caches"]["nbytes"], later["planned"]["seconds"]) == (0, None)
    remote = index_tiny(run, docs, "--db", "shared", "--remote", f"file://{tmp_path / 'remote'}")
    assert remote["limit_chosen"]
    assert run("cache", "stats", "--db", "shared", "--json")["remote"]["chunks"] == remote["total_chunks"]


def said_by(capsys: pytest.CaptureFixture[str], docs: Path, *options: object) -> str:
    from prophetkv_rag.cli.app import main

    assert main([str(option) for option in ("index", docs, "--chunk-size", 64, *options)]) == 0
    return capsys.readouterr().err


def test_it_is_said_in_one_line(docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = said_by(capsys, docs)
    assert first.count("KV caches may take") == first.count("KV caches to compute: ") == 1
    assert "--cache-limit SIZE changes that" in first
    again = said_by(capsys, docs)
    assert "KV caches" not in again
    purpose = said_by(capsys, docs, "--db", "small", "--cache-limit", "100kB")
    assert "may take" not in purpose
    assert "what is used most stays" in purpose


def test_another_model_is_planned_too(
    run: Run, fails: Run, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = index_tiny(run, docs)["caches"]["nbytes"]
    wide = save_tiny(tmp_path / "wide", num_hidden_layers=6)
    have_free(monkeypatch, needed // 2)  # and what the old caches give back: not enough for twice as much
    assert "are free" in fails("ask", "Who?", "--model", wide)
    have_free(monkeypatch, 2 * needed)
    assert run("ask", "Who?", "--model", wide, "--max-new-tokens", 1, "--json")["report"]["chunks"]


def open_it(caches: ServedCaches, model: Path) -> Any:
    with open_served(caches, str(model), ProphetKVConfig()) as (engine, _):
        engine.add_chunks(["A chunk that is long enough to be found in a prompt."])
        return engine.store.stats()


def test_serve_says_what_caches_take(
    run: Run, docs: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = index_tiny(run, docs, "--db", "db")["total_chunks"]
    have_free(monkeypatch, 100_000_000)
    monkeypatch.setattr("prophetkv_rag.store.disk.free_memory", lambda: 60_000_000)
    open_it(ServedCaches.asked(Path("db"), None, None, None, "3MB"), tiny_model)
    said = capsys.readouterr().err
    assert f"KV caches: {count} chunks" in said
    assert "up to 3 MB of them in memory" in said

    for directory, limit, expected in (
        (None, None, 30_000_000),
        (None, "2MB", 2_000_000),
        (None, "none", None),
        (Path("caches"), None, 50_000_000),
        (Path("caches"), "none", None),
        (Path("caches"), "2MB", 2_000_000),
    ):
        stats = open_it(ServedCaches.asked(None, directory, None, limit, None), tiny_model)
        assert stats.max_nbytes == expected, (directory, limit)
    have_free(monkeypatch, 0)  # a limit that is chosen evicts nothing
    stats = open_it(ServedCaches.asked(None, Path("caches"), None, None, None), tiny_model)
    assert (stats.chunks, stats.max_nbytes, stats.evictions) == (1, stats.nbytes, 0)


def test_limits_of_serve_that_do_not_fit_each_other() -> None:
    for arguments, said in (
        ((None, None, None, None, "1GB"), "--ram-limit goes with"),
        ((None, Path("x"), None, None, "none"), "0 to hold none"),
        ((Path("x"), None, None, "1GB", None), "goes without a database"),
    ):
        with pytest.raises(InputError, match=said):
            ServedCaches.asked(*arguments)


def test_sizes_and_times_for_people() -> None:
    assert [shown_bytes(size) for size in (0, 45_000, 1_234_000, 999_600_000, 14_200_000_000, 2e12)] == [
        "0 kB",
        "45 kB",
        "1.23 MB",
        "1,000 MB",
        "14.2 GB",
        "2,000 GB",
    ]
    assert [shown_duration(seconds) for seconds in (3.2, 700, 11_100)] == ["3 s", "12 min", "3 h 5 min"]
