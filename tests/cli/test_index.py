"""`index` on a tiny random model: only what changed is computed, whatever interrupts it."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import Run, index_tiny
from tests.tiny import save_tiny, text_of

pytestmark = pytest.mark.usefixtures("offline")


def test_chunks_are_encoded_behind_a_lead_in(run: Run, fails: Run, docs: Path, tmp_path: Path) -> None:
    settings = Path(".prophetkv") / "prophetkv-rag.json"
    index_tiny(run, docs)
    default = json.loads(settings.read_text())
    assert (default["lead_in"], default["encoding"], default["recompute_ratio"]) == ("", "previous:2", None)
    index_tiny(run, docs, "--lead-in", docs / "deep" / "two.md")
    first = json.loads(settings.read_text())
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
    found = [run("ask", "What did people watch?", "--max-new-tokens", 4, "--json") for _ in range(2)]
    statuses = [[chunk["status"] for chunk in answer["report"]["chunks"]] for answer in found]
    assert statuses[0][0] == "miss"  # what stands first has a second cache from now on
    assert {*statuses[0][1:], *statuses[1]} == {"hit"}
    assert "none.txt cannot be read" in fails("index", docs, "--lead-in", "none.txt")


@pytest.mark.parametrize("encoding", ["previous:2", "neighbours:2"])
def test_chunks_are_encoded_behind_others_and_what_loses_one_is_encoded_anew(
    run: Run, docs: Path, encoding: str
) -> None:
    first = index_tiny(run, docs, "--chunk-size", 64, "--encoding", encoding)
    assert first["encoding"] == encoding
    settings = json.loads((Path(".prophetkv") / "prophetkv-rag.json").read_text())
    assert (settings["encoding"], settings["lead_in"], settings["lead_in_tokens"]) == (encoding, "", 64)

    def behind(question: str) -> list[int]:
        answer = run("ask", question, "--top-k", 50, "--max-new-tokens", 1, "--strategy", "epic", "--json")
        assert {chunk["status"] for chunk in answer["report"]["chunks"]} == {"hit"}
        return sorted(chunk["behind"] for chunk in answer["report"]["chunks"])

    before = behind("What did people watch?")
    assert max(before) == 2
    assert before.count(0) == (2 if encoding == "previous:2" else 0)  # the first chunk of each of the two files
    text = (docs / "one.txt").read_text()
    (docs / "one.txt").write_text("A beginning of its own.\n\n" + text[len(text) // 3 :])
    again = index_tiny(run, docs)
    assert again["encoding"] == encoding
    assert max(behind("What did people watch?")) == 2
    assert "0 caches computed" in run("cache", "warm")
    assert "caches computed" in run("cache", "warm", "--refresh")
    plain = index_tiny(run, docs, "--encoding", "plain")
    assert plain["encoding"] == "plain"
    assert set(behind("What did people watch?")) == {0}


def test_an_encoding_that_is_none(fails: Run, docs: Path) -> None:
    assert "allowed: auto, plain, previous, neighbours" in fails("index", docs, "--encoding", "nearest")


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
    from prophetkv_rag.chroma.caches import CollectionCaches

    count = index_tiny(run, docs)["total_chunks"]
    other = save_tiny(tmp_path / "other", seed=5)
    proxies: list[KVCachingCollection] = []
    renewed: list[int] = []
    cache_existing, renew = KVCachingCollection.cache_existing, CollectionCaches.renew

    def watched(self: KVCachingCollection) -> None:
        proxies.append(self)
        cache_existing(self)

    def interrupted(self: CollectionCaches, stored: Any, progress: Any) -> None:
        renewed.append(len(stored))
        if len(renewed) == 2:
            raise KeyboardInterrupt
        renew(self, stored, progress)

    with monkeypatch.context() as patched:
        patched.setattr("prophetkv_rag.chroma.collection.QUERY_SIZE", 2)
        patched.setattr(KVCachingCollection, "cache_existing", watched)
        patched.setattr(CollectionCaches, "renew", interrupted)
        run("ask", "Who?", "--model", other, "--max-new-tokens", 1, status=130)
    assert renewed == [2, 2]
    assert proxies[0].progress is None
    # The first two chunks' caches are the other model's by now; the settings must not say that all are the first's.
    answer = run("ask", "Who?", "--model", tiny_model, "--top-k", 50, "--strategy", "epic", "--json")
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


def test_lost_caches_are_computed_again(run: Run, docs: Path) -> None:

    index_tiny(run, docs)
    shutil.rmtree(".prophetkv/prophetkv")
    answer = run("ask", "Who?", "--max-new-tokens", 1, "--json")
    assert len(answer["report"]["chunks"]) == 4
