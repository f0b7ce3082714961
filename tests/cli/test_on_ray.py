"""`index --ray` and `build_caches` on real workers: the same caches, no chunk computed twice, whoever dies."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine, StoreError
from prophetkv_rag.chunks import encoder
from prophetkv_rag.cli.cache.opened import open_caches
from prophetkv_rag.cli.database import open_chroma
from prophetkv_rag.distributed import build_caches
from prophetkv_rag.store.disk import open_disk_store
from tests.cli import counted_passes
from tests.cli.counted_passes import counting, passes
from tests.cli.program import Run, index_tiny
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = pytest.mark.usefixtures("offline", "one_embedding_model")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_memory_monitor_refresh_ms": "0"}
COMPUTED = encoder.encode_chunks, encoder.encode_behind
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("passes")


@pytest.fixture(scope="session")
def cluster(folder: Path) -> Iterator[Any]:
    """One machine, whose workers count; this process has joined it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        head = {"num_cpus": 3, "num_gpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False}
        started = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        ray.cloudpickle.register_pickle_by_value(counted_passes)
        hook = {"worker_process_setup_hook": counting(str(folder))}
        ray.init(address=started.address, runtime_env=hook, log_to_driver=False, logging_level="ERROR")
        yield started
        ray.shutdown()
        started.shutdown()


@pytest.fixture
def one_embedding_model(offline: None, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process embeds with the model whose directory the workers get."""
    monkeypatch.setattr("prophetkv_rag.defaults.embedding.fetch_embedding_model", lambda: tiny_encoder)


@pytest.fixture
def counted(folder: Path) -> Path:
    """Where this test's passes are noted."""
    for path in folder.iterdir():
        path.unlink()
    return folder


@pytest.fixture
def long_docs(docs: Path) -> Path:
    for number in range(4):
        (docs / f"{number}.txt").write_text(text_of(150, seed=10 + number))
    return docs


def must_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, this process may not run the model for a chunk."""

    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail("a chunk was computed by the process that only writes")

    monkeypatch.setattr(encoder, "encode_chunks", refuse)
    monkeypatch.setattr(encoder, "encode_behind", refuse)


def assert_same_caches(one: Path, other: Path) -> int:
    """Both databases hold caches of the same chunks, behind the same, equal but for the batches they ran in."""
    stores = [open_caches(path) for path in (one, other)]
    rows = [{row.key: row for row in store.catalog.rows()} for store in stores]
    assert rows[0].keys() == rows[1].keys()
    for key, row in rows[0].items():
        first, second = (store.find(key, fingerprint=row.fingerprint, input_ids=None).cache for store in stores)
        assert first is not None
        assert second is not None
        assert first.behind == second.behind
        torch.testing.assert_close((*first.keys, *first.values), (*second.keys, *second.values), atol=1e-5, rtol=1e-4)
    for store in stores:
        store.close()
    return len(rows[0])


def records(database: Path) -> dict[str, Any]:
    client, collection = open_chroma(database.resolve())
    found = collection.get(include=["documents", "metadatas", "embeddings"])
    client.close()
    columns = zip(found["documents"], found["metadatas"], found["embeddings"], strict=True)
    return dict(zip(found["ids"], columns, strict=True))


@pytest.mark.usefixtures("cluster")
def test_two_workers_make_what_index_makes_though_one_dies(
    run: Run, long_docs: Path, counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_tiny(run, long_docs, "--db", "plain")
    must_not_compute(monkeypatch)
    (counted / "die").write_text("3")
    remote = f"file://{tmp_path}/remote"
    report = index_tiny(run, long_docs, "--db", "onray", "--remote", remote, "--ray", "--ray-workers", 2)
    assert not (counted / "die").exists()
    done = report["ray"]
    assert (done["workers"], done["deaths"]) == (2, 1)
    count = assert_same_caches(Path("plain"), Path("onray"))
    assert count == report["new_chunks"] == done["computed"] + done["found"] > 20
    assert len(passes(counted)) == len(set(passes(counted))) == count
    plain, onray = records(Path("plain")), records(Path("onray"))
    assert plain.keys() == onray.keys()
    for name, (text, metadata, embedding) in plain.items():
        assert (text, metadata["file"], metadata["stamp"]) == (
            onray[name][0],
            *map(onray[name][1].get, ("file", "stamp")),
        )
        assert metadata["prophetkv_id"] == onray[name][1]["prophetkv_id"]
        torch.testing.assert_close(torch.tensor(embedding), torch.tensor(onray[name][2]), atol=1e-5, rtol=1e-4)

    # What stood behind a chunk that goes is computed anew, and not by this process either.
    text = (long_docs / "0.txt").read_text()
    (long_docs / "0.txt").write_text("Another beginning. " + text[text.index(" ", 150) :])
    again = index_tiny(run, long_docs, "--db", "onray", "--ray", "--ray-workers", 1)
    assert (again["indexed"], again["caches_not_kept"]) == (["0.txt"], 0)
    assert again["caches"]["chunks"] == again["total_chunks"]
    with monkeypatch.context() as patched:
        patched.setattr(encoder, "encode_chunks", COMPUTED[0])
        patched.setattr(encoder, "encode_behind", COMPUTED[1])
        index_tiny(run, long_docs, "--db", "anew")
    assert_same_caches(Path("anew"), Path("onray"))


def test_a_killed_driver_is_started_again_and_only_the_rest_is_computed(
    run: Run,
    long_docs: Path,
    counted: Path,
    tmp_path: Path,
    tiny_model: Path,
    tiny_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Without a remote tier, and by `--ray` alone, which starts a Ray of its own that ends with the driver."""
    shutil.copy(ROOT / "tests" / "cli" / "counted_passes.py", tmp_path)
    install = f"from counted_passes import counting\ncounting({str(counted)!r})()\n"
    (tmp_path / "sitecustomize.py").write_text(install)
    (counted / "hold").write_text("4")
    code = (
        "import sys, prophetkv_rag.defaults as defaults\nfrom pathlib import Path\n"
        f"defaults.fetch_embedding_model = lambda progress=None: Path({str(tiny_encoder)!r})\n"
        "from prophetkv_rag.cli.app import main\nsys.exit(main(sys.argv[1:]))"
    )
    arguments = ["index", str(long_docs), "--model", str(tiny_model), "--chunk-size", "64", "--ray"]
    environment = os.environ | QUIET | {"PYTHONPATH": str(tmp_path), "RAY_TMPDIR": str(Path("/tmp/ray"))}
    driver = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    while not (counted / "held").exists():
        assert driver.poll() is None, driver.stderr and driver.stderr.read()
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    (counted / "hold").unlink()
    before = passes(counted)
    assert len(before) >= 4

    request.getfixturevalue("cluster")
    must_not_compute(monkeypatch)
    report = index_tiny(run, long_docs, "--model", tiny_model, "--ray", "--ray-workers", 1)
    assert report["caches"]["chunks"] == report["new_chunks"] == len(passes(counted)) == len(set(passes(counted)))
    assert report["ray"]["computed"] == len(passes(counted)) - len(before)
    assert run("cache", "verify", "--json")["bad"] == []


@pytest.mark.usefixtures("cluster")
def test_caches_without_a_database_and_a_full_remote_tier(counted: Path, tiny_model: Path, tmp_path: Path) -> None:
    documents = [[text_of(20, seed=10 * number + place) for place in range(4)] for number in range(4)]
    documents.append(["What stands alone here is a text of its own.", documents[0][2], documents[1][1], "The end."])
    different = {text for document in documents for text in document}
    config = ProphetKVConfig(encoding="previous:2", prompt_template="Read: {context} So?")
    remote = f"file://{tmp_path}/remote"

    def build(**options: Any) -> Any:
        return build_caches(documents, tiny_model, remote=remote, config=config, num_workers=1, **options)

    with pytest.raises(StoreError, match=r"is at its limit of 300,000 bytes.*only the rest is computed"):
        build(remote_max_bytes=300_000)
    kept = {path.stem for path in (tmp_path / "remote").rglob("*.safetensors")}
    before = passes(counted)
    assert 3 < len(kept) < len(different)
    assert kept <= set(before)
    told: list[tuple[int, int]] = []
    report = build(progress=lambda done, total: told.append((done, total)))
    assert (report.chunks, report.found) == (len(different), len(kept))
    assert told[-1] == (len(different), len(different))
    after = passes(counted)[len(before) :]
    assert len(after) == len(set(after)) == report.computed == len(different) - len(kept)
    assert kept.isdisjoint(after)

    store = open_disk_store(tmp_path / "here", remote=remote)
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=config, store=store)
    assert engine.identity.fingerprint == report.fingerprint
    clean = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=config)
    computed: list[int] = []
    for document in documents:
        engine.add_chunks(document, progress=lambda done, total: computed.append(done))
        clean.add_chunks(document)
    assert computed == []
    for document in documents:
        for text in document:
            key = clean.key_of(text)
            lookups = [
                one.store.find(key, fingerprint=clean.identity.fingerprint, input_ids=None) for one in (engine, clean)
            ]
            ours, wanted = (lookup.cache for lookup in lookups)
            assert ours is not None
            assert wanted is not None
            assert ours.behind.traces == wanted.behind.traces
            torch.testing.assert_close(ours.keys, wanted.keys, atol=1e-5, rtol=1e-4)
    store.close()


@pytest.mark.usefixtures("cluster")
def test_the_example_of_the_docs_runs_as_printed(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "ray.md").read_text("utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for ours, printed in ((tiny_model, "Qwen/Qwen2.5-7B-Instruct"), (f"file://{tmp_path}/r", "s3://bucket/caches")):
        assert code.count(printed) == 1
        code = code.replace(printed, str(ours))
    script = tmp_path / "example.py"
    script.write_text(code, "utf-8")
    runpy.run_path(str(script))
    assert capsys.readouterr().out.strip().endswith("3 chunks: 3 computed, 0 were there")


def test_several_machines_need_a_remote_tier(fails: Run, docs: Path, cluster: Any) -> None:
    node = cluster.add_node(num_cpus=1)
    try:
        cluster.wait_for_nodes()
        assert "has 2 machines, and the database no remote tier" in fails("index", docs, "--ray")
    finally:
        cluster.remove_node(node)


@pytest.mark.usefixtures("cluster")
def test_more_workers_than_there_are_cpus(fails: Run, docs: Path) -> None:
    assert "9 workers are too many" in fails("index", docs, "--ray", "--ray-workers", 9)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--ray", "10.0.0.1:a"), "give local (Ray is started here), auto (the one that runs here) or HOST:PORT"),
        (("--ray", "ray://10.0.0.1:10001"), "Ray Client is not supported"),
        (("--ray", "--cache-policy", "on_first_use"), "leave --ray out, or give --cache-policy eager"),
        (("--ray-workers", "2"), "--ray-workers goes with --ray"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_fetched(
    fails: Run, docs: Path, arguments: tuple[str, ...], part: str
) -> None:
    assert part in fails("index", docs, *arguments)


def test_an_address_that_nobody_answers_at(tmp_path: Path, docs: Path, tiny_model: Path) -> None:
    """In a process that is in no cluster."""
    code = (
        "import sys\nfrom prophetkv_rag.distributed import connect\nfrom prophetkv_rag.errors import InputError\n"
        "try:\n    with connect('127.0.0.1:1'):\n        pass\nexcept InputError as error:\n    print(error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | QUIET, check=True
    )
    assert (
        "no Ray cluster answers at 127.0.0.1:1 (Connection refused); start one with `ray start --head`" in said.stdout
    )


def test_without_ray(fails: Run, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'prophetkv-rag[ray]'" in fails("index", docs, "--ray")
