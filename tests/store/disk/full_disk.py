"""What happens on a disk that is full: run in a process of its own, on a small file system made for it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.tiered import TieredStore
from tests.tiny import save_tiny, save_tiny_encoder, text_of, tiny_llama, tiny_tokenizer

torch.set_num_threads(1)  # the machine may be busy

TEXTS = [text_of(20, seed=seed) for seed in range(24)]
CHECKED = (0, 11, 23)  # whose answers are compared


class Warnings(logging.Handler):
    """Keeps what the package warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("prophetkv_rag").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def fill(directory: Path) -> Path:
    """Take all that is left of the file system; returns the file."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return ballast


def statuses(engine: ProphetKVEngine, clean: ProphetKVEngine) -> list[str]:
    """Ask about every text; the answers must be those of an engine whose store never failed."""
    found = []
    for number, text in enumerate(TEXTS):
        result = engine.prefill("Read: " + text + " So?")
        found += [chunk.status for chunk in result.report.chunks]
        if number in CHECKED:
            wanted = clean.prefill(Prompt("Read: ", [text], " So?"))
            torch.testing.assert_close(result.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    assert len(found) == len(TEXTS), "every text is found in its prompt, stored or not"
    engine.store.flush()
    return found


def index(mounted: str) -> None:
    """Index more than the disk takes, ask, make room, add again."""
    directory, warnings = Path(mounted), Warnings()
    config = ProphetKVConfig(recompute_ratio=0.0, index_batch_tokens=64)
    clean = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=config)
    keys = clean.add_chunks(TEXTS)
    store = DiskStore(directory / "store", 0)
    engine = ProphetKVEngine(clean.model, clean.tokenizer, config=config, store=store)
    engine.add_chunks(TEXTS[:2], owner="a")
    ballast = fill(directory)
    computed: list[int] = []
    assert engine.add_chunks(TEXTS, owner="a", progress=lambda done, total: computed.append(done)) == keys
    assert len(computed) < 12, "what cannot be kept is not computed for nothing"
    assert statuses(engine, clean) == ["hit"] * 2 + ["miss"] * 22
    assert store.stats().failed_writes >= 22
    assert len(warnings.messages) == 1, warnings.messages
    assert "cannot be stored" in warnings.messages[0]
    ballast.unlink()
    assert engine.remove_chunks(keys[5:7], owner="a") == keys[5:7], "also what the disk has never heard of"
    engine.add_chunks(TEXTS, owner="a")
    assert statuses(engine, clean) == ["hit"] * 24
    report = store.verify()
    assert (report.checked, report.num_faults) == (24, 0)
    assert set(store.references("a")) == set(keys)
    store.close()
    assert len(warnings.messages) == 1, warnings.messages
    again = ProphetKVEngine(clean.model, clean.tokenizer, config=config, store=DiskStore(directory / "store", 0))
    assert statuses(again, clean) == ["hit"] * 24
    print("one warning, same answers:", warnings.messages[0][-60:])


def with_remote(mounted: str) -> None:
    """A remote tier behind the full disk: new caches go there alone, as long as the catalog can note them."""
    directory, remote, warnings = Path(mounted), Path(mounted).parent / "remote", Warnings()
    config = ProphetKVConfig(recompute_ratio=0.0, index_batch_tokens=64)
    clean = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=config)
    texts = [text_of(100, seed=seed) for seed in range(10)]
    keys = clean.add_chunks(texts)

    def there() -> set[str]:
        return {path.stem for path in remote.rglob("*.safetensors")}

    def tiers(texts: list[str]) -> list[str]:
        found = []
        for text in texts:
            result = engine.prefill("Read: " + text + " So?")
            found += [chunk.tier for chunk in result.report.chunks]
            wanted = clean.prefill(Prompt("Read: ", [text], " So?"))
            torch.testing.assert_close(result.logits, wanted.logits, atol=1e-4, rtol=1e-4)
            engine.store.flush()
        assert len(found) == len(texts), "every text is found in its prompt, stored or not"
        return found

    store = TieredStore(directory / "store", 0, remote=f"file://{remote}", remote_timeout_s=60.0)
    engine = ProphetKVEngine(clean.model, clean.tokenizer, config=config, store=store)
    engine.add_chunks(texts[:2], owner="a")
    store.flush()
    store.catalog.scrub()  # as in a store that was opened before
    ballast = fill(directory)
    size = store.files.path(keys[0]).stat().st_size
    with ballast.open("r+b") as file:  # no blob has room, and the catalog has
        file.truncate(ballast.stat().st_size - int(0.9 * size))
    computed: list[int] = []
    assert engine.add_chunks(texts[:9], owner="a", progress=lambda done, total: computed.append(done)) == keys[:9]
    store.flush()
    assert len(computed) == 7, "and none of it is for nothing"
    assert there() == set(keys[:9])
    assert len(list((directory / "store" / "blobs").rglob("*.safetensors"))) == 2
    assert tiers(texts[:9]) == ["disk"] * 2 + ["remote"] * 7
    assert (store.stats().failed_writes, store.failures.is_failing) == (0, False)
    assert len(warnings.messages) == 1, warnings.messages
    assert "go to file://" in warnings.messages[0], warnings.messages
    store.catalog.scrub()  # its log has used up the little that was left
    assert engine.remove_chunks(keys[5:7], owner="a") == keys[5:7]
    store.flush()
    assert there() == set(keys[:9]) - set(keys[5:7]), "what was never on the disk is deleted there too"

    store.catalog.scrub()  # or its log would have room of its own
    rest = fill(directory / "store")  # not even the catalog has room now
    engine.add_chunks(texts[5:], owner="a")
    store.flush()
    new = there() - set(keys[:9])
    assert new == set(), (
        "what the catalog cannot note is not uploaded: nobody would know that it is to be deleted there"
    )
    assert tiers(texts) == ["disk"] * 2 + ["remote"] * 3 + ["computed"] * 2 + ["remote"] * 2 + ["computed"]
    assert store.stats().failed_writes > 0
    assert len(warnings.messages) == 1, warnings.messages

    for path in (rest, ballast):
        path.unlink()
    engine.add_chunks(texts, owner="a")
    store.flush()
    assert tiers(texts) == ["disk"] * 10
    assert there() == set(keys)
    assert store.verify().num_faults == 0
    store.close()
    print("uploaded all the same:", warnings.messages[0][:60])


def command_line(mounted: str) -> None:
    """`index`, `ask` and `cache warm` of a database whose caches lie on a small disk of their own."""
    from prophetkv_rag.cli import indexing
    from prophetkv_rag.cli.app import main

    directory = Path(mounted).parent
    model, encoder = save_tiny(directory / "model"), save_tiny_encoder(directory / "encoder")
    import prophetkv_rag.defaults

    prophetkv_rag.defaults.fetch_default_model = lambda progress: model  # type: ignore[assignment]
    prophetkv_rag.defaults.fetch_embedding_model = lambda progress=None: encoder  # type: ignore[assignment]
    docs = directory / "docs"
    docs.mkdir()
    for number in range(12):
        (docs / f"{number}.txt").write_text(text_of(60, seed=number))
    database = Path(mounted).parent

    def run(*arguments: str) -> tuple[int, str]:
        import contextlib
        import io

        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = main([*arguments, "--db", str(database)])
        return status, printed.getvalue()

    ballast = Path(mounted) / "ballast"
    ballast.write_bytes(bytes(3_500_000))
    status, printed = run("index", str(docs), "--json", "--chunk-size", "64")
    assert (status, printed) == (2, "")  # they do not fit, so it does not begin
    assert not list(Path(mounted).rglob("*.safetensors"))
    ballast.unlink()
    insert = indexing._insert

    def while_the_disk_fills(*arguments: object) -> None:
        ballast.write_bytes(bytes(3 << 20))
        insert(*arguments)
        os.truncate(ballast, (3 << 20) - (32 << 10))  # room for what the catalog notes at its end

    indexing._insert = while_the_disk_fills
    status, printed = run("index", str(docs), "--json", "--chunk-size", "64", "--cache-limit", "32MB")
    report = json.loads(printed)
    assert status == 0
    assert 0 < report["caches_not_kept"] < report["total_chunks"], report
    assert "No space left" in report["reason"] or "disk is full" in report["reason"]  # the blobs, or SQLite
    assert report["caches"]["chunks"] == report["total_chunks"] - report["caches_not_kept"]
    status, short = run("ask", "What is it?", "--json")
    assert status == 0
    assert run("cache", "warm")[0] == 1
    status, printed = run("cache", "warm")
    assert "could not be kept" in printed
    subprocess.run(["mount", "-o", "remount,size=64m", mounted], check=True)
    status, printed = run("cache", "warm", "--json")
    assert status == 0
    assert json.loads(printed)["chunks"] - report["total_chunks"] in (
        0,
        1,
    )  # the question may have stored a second cache
    status, whole = run("ask", "What is it?", "--json")
    first, second = json.loads(short), json.loads(whole)
    assert first["answer"] == second["answer"]
    assert {chunk["status"] for chunk in second["report"]["chunks"][1:]} == {"hit"}  # the first may be its second cache
    status, printed = run("cache", "stats", "--json")
    counts = json.loads(printed)["counts"]
    assert counts["failed_writes"] > 0, counts
    assert counts["hits"] > 0, counts
    print("caches not kept:", report["caches_not_kept"], "of", report["total_chunks"])


if __name__ == "__main__":
    {"index": index, "with_remote": with_remote, "command_line": command_line}[sys.argv[1]](sys.argv[2])
