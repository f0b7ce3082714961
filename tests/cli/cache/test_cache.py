"""`cache ...` on a tiny random model: what is stored, shared, limited, encrypted and moved."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import Run, index_tiny

pytestmark = pytest.mark.usefixtures("offline")


def index_plain(run: Run, docs: Path, *more: object) -> dict[str, Any]:
    """Every chunk's one cache then serves wherever it stands in a prompt."""
    return index_tiny(run, docs, "--encoding", "plain", *more)


def test_cache_stats_and_verify(run: Run, docs: Path) -> None:
    report = index_plain(run, docs)
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


def test_cache_gc_and_clear_and_warm(run: Run, docs: Path) -> None:
    count = index_plain(run, docs)["total_chunks"]
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


def test_warm_computes_what_waits_for_its_first_use(run: Run, docs: Path) -> None:
    """That is now, whatever the database's policy is; the database keeps its policy."""
    report = index_tiny(run, docs, "--cache-policy", "on_first_use")
    assert report["caches"]["chunks"] == 0
    files, count = sum(path.is_file() for path in docs.rglob("*")), report["total_chunks"]
    assert run("cache", "warm", "--json")["computed"] == count
    assert run("cache", "warm", "--first-chunks", "--json")["computed"] == count - files  # a file's first needs none
    assert "0 caches computed" in run("cache", "warm", "--first-chunks")
    answer = run("ask", "Who?", "--max-new-tokens", 1, "--json")
    assert {chunk["status"] for chunk in answer["report"]["chunks"]} == {"hit"}
    assert index_tiny(run, docs)["planned"]["chunks"] == 0
    (docs / "more.txt").write_text("Words that nobody has asked for yet.")
    assert index_tiny(run, docs)["caches"]["chunks"] == 2 * count - files


def test_cache_export_and_import(run: Run, docs: Path, tmp_path: Path) -> None:
    count = index_plain(run, docs)["total_chunks"]
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
    whole = index_plain(run, docs)
    limit = whole["caches"]["nbytes"] // 2
    run("cache", "clear", "--all")
    index_plain(run, docs, "--cache-limit", limit, "--cache-format", "int8")
    run("cache", "warm")
    small = run("cache", "stats", "--json")
    assert small["limit"] == limit
    assert small["chunks"] == whole["caches"]["chunks"]
    assert small["nbytes"] < limit
    index_plain(run, docs, "--cache-limit", "1e3", "--cache-policy", "on_first_use")
    answer = run("ask", "Who?", "--max-new-tokens", 1, "--json")
    assert len(answer["report"]["chunks"]) == 4


def test_a_remote_tier_that_is_gone_for_good_is_given_up(run: Run, fails: Run, docs: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    count = index_plain(run, docs, "--remote", url)["total_chunks"]
    assert "other_remotes" not in run("cache", "gc", "--json")
    index_plain(run, docs, "--remote", "none")
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
    whole = index_plain(run, docs, "--cache-limit", "none")
    limit = whole["caches"]["nbytes"] // 2
    run("cache", "clear", "--all")
    index_plain(run, docs, "--namespace-limit", limit)
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
    count = index_plain(run, docs, "--remote", url, "--remote-limit", "1GB", "--remote-timeout", 5)["total_chunks"]
    blobs = [path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))]
    assert len(blobs) == count
    found = run("cache", "stats", "--json")["remote"]
    assert (found["url"], found["chunks"], found["max_bytes"], found["waiting"]) == (url, count, 10**9, 0)
    assert f"{count} of them in file://" in run("cache", "stats")

    run("index", docs, "--db", "other", "--chunk-size", 64, "--encoding", "plain", "--remote", url, "--json")
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
    index_plain(run, docs, "--remote", "none")
    assert "remote" not in run("cache", "stats", "--json")


def test_encrypted_caches(run: Run, fails: Run, docs: Path, tmp_path: Path) -> None:
    old, new, exported = tmp_path / "old.key", tmp_path / "new.key", tmp_path / "caches.tar"
    key_id = run("cache", "new-key", old, "--json")["key_id"]
    assert run("cache", "new-key", new, "--json")["key_id"] != key_id
    assert "not written over" in fails("cache", "new-key", old)
    count = index_plain(run, docs, "--key-file", old)["total_chunks"]
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
    index_plain(run, docs, "--key-file", "none")
    assert "either --from-key-file or" in fails("cache", "import", exported, "--from-plain", "--from-key-file", old)


def test_mistakes_with_caches_are_said_in_one_line(run: Run, fails: Run, docs: Path, tmp_path: Path) -> None:
    index_plain(run, docs)
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
