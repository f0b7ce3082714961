"""The tier behind the disk: what goes there, what comes back, its limit, and that deleted means deleted there too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import chromadb
import pytest

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.chroma.store import open_store
from prophetkv_rag.errors import InputError
from prophetkv_rag.store.blobs.blob import encode_blob
from prophetkv_rag.store.disk.opening import open_disk_store
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.tiered import TieredStore
from prophetkv_rag.store.disk.upkeep import clear, gc, verify
from prophetkv_rag.store.remote.breaker import Breaker
from prophetkv_rag.store.remote.files import RemoteFiles
from prophetkv_rag.store.reports import RemoteStats
from tests.store.caches import FINGERPRINT, assert_same, found_in, ids_of, key_of, make_cache
from tests.store.faulty_files import FaultyFileSystem, hanging, raising
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[3]
REMOTE = "faulty://bucket/caches"
SIZE = len(encode_blob(make_cache(1), key=key_of(1), fingerprint=FINGERPRINT))


@pytest.fixture(autouse=True)
def _empty_remote() -> None:
    FaultyFileSystem.clear()


def opened(directory: Path, remote: str = REMOTE, ram_bytes: int = 0, **settings: object) -> TieredStore:
    settings = {"remote_timeout_s": 30.0, **settings}  # a busy machine is slow by itself
    store = open_disk_store(directory, ram_bytes=ram_bytes, remote=remote, **settings)
    assert isinstance(store, TieredStore)
    return store


def put(store: DiskStore, *seeds: int, owner: str | None = None) -> None:
    for seed in seeds:
        store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)
        if owner is not None:
            store.add_references(owner, [key_of(seed)])
    store.flush()


def got(store: DiskStore, *seeds: int) -> list[bool]:
    """Which of them the store can give, which then has done what it puts off."""
    found = found_in(store, *seeds)
    store.flush()
    return found


def remote_of(store: DiskStore) -> RemoteStats:
    found = store.stats().remote
    assert found is not None
    return found


def there(*seeds: int) -> list[bool]:
    return [any(key_of(seed) in name for name in FaultyFileSystem.names()) for seed in seeds]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_what_one_machine_stores_another_finds(tmp_path: Path, scheme: str) -> None:
    url = f"memory://{tmp_path.name}" if scheme == "memory" else f"file://{tmp_path}/remote"
    one = opened(tmp_path / "one", url)
    put(one, 1, 2, 3)
    assert (remote_of(one).uploads, remote_of(one).chunks, remote_of(one).nbytes) == (3, 3, 3 * SIZE)
    other = opened(tmp_path / "other", url)
    assert got(other, 1, 2, 3, 4) == [True, True, True, False]
    assert (remote_of(other).hits, remote_of(other).misses, other.stats().hits, other.stats().misses) == (3, 1, 3, 1)
    assert key_of(1) not in other, "nobody here has the chunk: it is used once"
    put(other, 1)
    assert remote_of(other).uploads == 0, "it is there already"
    other.close()
    one.close()
    if scheme == "file":
        assert (tmp_path / "remote").stat().st_mode & 0o077 == 0
        assert (
            sorted(path.suffix for path in (tmp_path / "remote").rglob("*") if path.is_file()) == [".safetensors"] * 3
        )


def test_a_chunk_of_ours_comes_to_the_disk_and_is_read_from_there_the_next_time(tmp_path: Path) -> None:
    put(opened(tmp_path / "one"), 1, 2)
    other = opened(tmp_path / "other")
    for seed in (1, 2):
        other.note(key_of(seed), fingerprint=FINGERPRINT, num_tokens=5, entry=None)
    assert got(other, 1) == [True]
    assert key_of(1) in other
    reads = FaultyFileSystem.calls["cat_file"]
    assert got(other, 1) == [True]
    other.read_ahead([key_of(2)], fingerprint=FINGERPRINT)
    other.flush()
    assert key_of(2) in other, "what was found is read ahead"
    assert FaultyFileSystem.calls["cat_file"] == reads + 1
    assert FaultyFileSystem.calls["pipe_file"] == 2, "what came from there is not uploaded again"
    other.close()
    again = opened(tmp_path / "other")
    assert remote_of(again).all_hits == 2, "hits are remembered"
    again.close()


def test_a_bad_blob_on_the_disk_is_replaced_by_the_remote_s(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, 1, 2)
    for seed in (1, 2):
        store.files.path(key_of(seed)).write_bytes(b"nonsense")
        gate = threading.Event()  # the thread that drops it has other things to do
        store._later.run(gate.wait, 60)
        found = store.find(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed))
        assert (found.was_corrupt, found.tier) == (False, "remote")
        assert_same(found.cache, make_cache(seed))
        store._fetches.flush()
        gate.set()
        store.flush()
        found = store.find(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed))
        assert (found.was_corrupt, found.tier) == (False, "disk")
    assert store.verify().num_faults == 0
    store.close()


def test_what_waits_to_be_read_from_a_disk_that_has_lost_it_is_uploaded_from_memory(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with hanging("pipe_file"):
        store.put(key_of(1), make_cache(1), fingerprint=FINGERPRINT)  # keeps the thread busy
        while FaultyFileSystem.calls["pipe_file"] == 0:
            time.sleep(0.01)
        store.put(key_of(2), make_cache(2), fingerprint=FINGERPRINT)
        data = store.files.path(key_of(2)).read_bytes()
        store.files.remove([key_of(2)])
        uploads = store.remote.uploads
        assert uploads is not None
        assert uploads.offer(key_of(2), FINGERPRINT, data)
    store.flush()
    assert there(1, 2) == [True, True]
    store.close()


def test_a_corpus_larger_than_the_disk_is_in_the_remote(tmp_path: Path) -> None:
    model = tiny_llama()
    texts = [text_of(20, seed=seed) for seed in range(6)]
    prompt = "Read: " + " ".join(texts) + " So?"
    config = ProphetKVConfig(recompute_ratio=0.0)
    measure = ProphetKVEngine(model, tiny_tokenizer(), config=config, store=DiskStore(tmp_path / "measure", 0))
    measure.add_chunks(texts)
    limit = measure.store.stats().nbytes // 3
    computed: list[int] = []

    def count(done: int, total: int) -> None:
        computed.append(done)

    for machine, expected in (("one", 6), ("other", 0)):
        store = opened(tmp_path / machine, max_bytes=limit)
        engine = ProphetKVEngine(model, tiny_tokenizer(), config=config, store=store)
        computed.clear()
        engine.add_chunks(texts, owner="docs", progress=count)
        assert len(computed) == expected, "the second machine computes nothing"
        store.flush()
        assert 0 < store.stats().nbytes <= limit
        assert len(FaultyFileSystem.names()) == 6
        report = engine.prefill(prompt).report
        assert [chunk.status for chunk in report.chunks] == ["hit"] * 6
        store.flush()
        blobs = sum(path.stat().st_size for path in (tmp_path / machine / "blobs").rglob("*.safetensors"))
        assert blobs <= limit
        store.close()


def test_its_limit_holds_at_every_moment_and_what_is_used_stays(tmp_path: Path) -> None:
    store = opened(tmp_path, remote_max_bytes=3 * SIZE + 100)
    put(store, 1, 2, 3, 4)
    assert there(1, 2, 3, 4) == [True, True, True, False], "what nobody asked for displaces nothing"
    assert remote_of(store).nbytes == 3 * SIZE
    for _ in range(5):
        got(store, 4, 5, 2)
    put(store, 5)
    got(store, 5, 5, 5)
    store.push()
    store.flush()
    assert there(1, 2, 3, 4, 5).count(True) == 3
    assert there(2, 4, 5) == [True, True, True]
    assert FaultyFileSystem.most_bytes <= 3 * SIZE + 100
    assert FaultyFileSystem.calls["pipe_file"] == 5
    store.close()


def test_what_other_machines_put_there_counts_and_is_not_evicted(tmp_path: Path) -> None:
    put(opened(tmp_path / "one"), 1, 2)
    store = opened(tmp_path / "other", remote_max_bytes=3 * SIZE + 100)
    put(store, 3, 4)
    got(store, *[4] * 5)
    store.push()
    store.flush()
    assert there(1, 2) == [True, True]
    assert there(3, 4).count(True) == 1
    assert remote_of(store).other_bytes == 2 * SIZE
    assert FaultyFileSystem.most_bytes <= 3 * SIZE + 100
    store.close()


def test_deleted_means_deleted_there_too(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, 1, 2, 3, owner="a")
    store.delete([key_of(1)])
    assert store.drop_references("a", [key_of(2)]) == [key_of(2)]
    store.flush()
    assert there(1, 2, 3) == [False, False, True]
    with store.catalog.transaction() as run:
        run.execute("DELETE FROM refs")
    report = gc(store, grace_s=-1)
    assert (report.unreferenced, report.remote_deleted, report.remote_waiting) == (1, 1, 0)
    assert FaultyFileSystem.names() == []
    store.close()


def test_a_delete_that_fails_is_remembered_and_its_chunk_is_not_served(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, 1, 2, owner="a")
    FaultyFileSystem.before = staticmethod(raising(ConnectionResetError("down"), "rm_file"))
    store.delete([key_of(1)])
    store.flush()
    assert there(1) == [True]
    assert remote_of(store).waiting == 1
    assert got(store, 1) == [False], "it is there still, but it has been deleted"
    report = gc(store)
    assert (report.remote_deleted, report.remote_waiting) == (0, 1)
    store.close()
    FaultyFileSystem.reset()
    store = opened(tmp_path)
    store.flush()
    assert there(1, 2) == [False, True]
    assert remote_of(store).waiting == 0
    put(store, 1)
    assert there(1, 2) == [True, True], "and it may come back"
    store.close()


def test_a_process_that_knows_no_remote_deletes_there_all_the_same(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, 1, 2, owner="a")
    store.close()
    plain = DiskStore(tmp_path)
    plain.drop_references("a", [key_of(1)])
    plain.close()
    assert there(1, 2) == [True, True]
    store = opened(tmp_path)
    assert got(store, 1) == [False]
    assert there(1, 2) == [False, True]
    store.close()


def test_what_is_deleted_while_it_is_uploaded_does_not_stay(tmp_path: Path) -> None:
    store = opened(tmp_path)
    other = DiskStore(tmp_path)

    def before(method: str, path: str) -> None:
        if method == "pipe_file" and key_of(1) in path:
            other.delete([key_of(1)])

    FaultyFileSystem.before = staticmethod(before)
    put(store, 2, 1)
    assert there(1, 2) == [False, True]
    other.close()
    store.close()


def test_clearing_a_namespace_proves_it_and_leaves_the_others(tmp_path: Path) -> None:
    model = tiny_llama()
    texts = [text_of(20, seed=seed) for seed in range(2)]

    def engine_of(machine: str, namespace: str, chunks: list[str]) -> ProphetKVEngine:
        config = ProphetKVConfig(namespace=namespace)
        engine = ProphetKVEngine(model, tiny_tokenizer(), config=config, store=opened(tmp_path / machine))
        engine.add_chunks(chunks)
        engine.store.flush()
        return engine

    tenant = engine_of("here", "tenant", texts[:1])
    neighbour = engine_of("here", "neighbour", texts)
    engine_of("elsewhere", "tenant", texts).store.close()
    assert len(FaultyFileSystem.names()) == 4
    tenant.store.close()
    store = neighbour.store
    assert isinstance(store, TieredStore)
    FaultyFileSystem.before = staticmethod(raising(ConnectionResetError("down"), "rm"))
    assert clear(store, "tenant") == 1
    assert remote_of(store).waiting == 2  # whole fingerprints: chunks alone, and second caches of first chunks
    store.close()
    FaultyFileSystem.reset()
    store = opened(tmp_path / "here")
    store.flush()
    assert remote_of(store).waiting == 0
    fingerprints = {tenant.identity.fingerprint: 0, neighbour.identity.fingerprint: 0}
    for name in FaultyFileSystem.names():
        fingerprints[name.split("/")[-2]] += 1
    assert fingerprints == {tenant.identity.fingerprint: 0, neighbour.identity.fingerprint: 2}
    assert clear(store) == 2
    assert FaultyFileSystem.names() == []
    store.close()


def test_verify_finds_what_is_bad_or_gone_there_and_push_makes_it_good(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, 1, 2, 3)
    assert verify(store).remote_checked == 3
    names = {seed: next(name for name in FaultyFileSystem.names() if key_of(seed) in name) for seed in (1, 2)}
    FaultyFileSystem.store[names[1]].seek(SIZE - 3)
    FaultyFileSystem.store[names[1]].write(b"???")
    del FaultyFileSystem.store[names[2]]
    for repair in (False, True):
        report = verify(store, repair=repair)
        assert (report.remote_bad, report.remote_missing, report.num_faults) == ((key_of(1),), (key_of(2),), 2)
    assert there(1, 2, 3) == [False, False, True]
    assert store.push() == 2
    store.flush()
    assert (verify(store).num_faults, verify(store).remote_checked) == (0, 3)
    FaultyFileSystem.before = staticmethod(raising(ConnectionResetError("down")))
    assert "ConnectionResetError: down" in verify(store).remote_error
    store.close()


def test_read_only_writes_nothing(tmp_path: Path) -> None:
    one = opened(tmp_path / "one")
    put(one, 1)
    plain = DiskStore(tmp_path / "other")
    put(plain, 2)
    plain.close()
    calls = FaultyFileSystem.calls["pipe_file"]
    store = opened(tmp_path / "other", ram_bytes=10**6, policy="read_only")
    assert got(store, 1, 2, 3) == [True, True, False]
    store.put(key_of(3), make_cache(3), fingerprint=FINGERPRINT)
    store.put_soon(key_of(4), make_cache(4), fingerprint=FINGERPRINT)
    with pytest.raises(InputError, match="read_only"):
        store.push()
    store.flush()
    store.close()
    assert FaultyFileSystem.calls["pipe_file"] == calls
    assert len(FaultyFileSystem.names()) == 1


KILLED = """
import signal, sys
sys.path.append({root!r})
from tests.store.remote.test_tiered import *
store = open_disk_store({directory!r}, remote={url!r})
for seed in range(8):
    store.put(key_of(seed), make_cache(seed, num_tokens=400), fingerprint=FINGERPRINT)
print("stored", flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_kill_loses_nothing_that_the_next_push_does_not_bring(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    code = KILLED.format(root=str(ROOT), directory=str(tmp_path / "store"), url=url)
    process = subprocess.Popen([sys.executable, "-P", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "stored\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = tmp_path / "remote" / FINGERPRINT
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{key_of(0, 400)}.{'0' * 16}.tmp").write_bytes(b"half")  # as a kill at the right moment leaves it
    (folder / f"{key_of(1, 400)}.safetensors").write_bytes(b"half")
    store = opened(tmp_path / "store", url)
    store.push()
    store.flush()
    report = verify(store, repair=True)
    assert set(report.remote_bad) <= {key_of(1, 400)}  # of the size that the catalog does not know: found and replaced
    store.push()
    store.flush()
    report = verify(store)
    assert (report.checked, report.remote_checked, report.num_faults) == (8, 8, 0)
    assert gc(store, {"": {key_of(seed, 400) for seed in range(8)}}, grace_s=3600).remote_orphans == 0
    unfinished = list(folder.glob("*.tmp"))  # that one, and what the kill itself may have cut short
    for path in unfinished:
        os.utime(path, (0, 0))
    assert gc(store, grace_s=3600).remote_orphans == len(unfinished)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}
    store.close()


def test_what_was_not_uploaded_is_when_it_is_next_used(tmp_path: Path) -> None:
    plain = DiskStore(tmp_path)
    put(plain, 1, 2)
    plain.close()
    store = opened(tmp_path)
    assert got(store, 1) == [True]
    assert there(1, 2) == [True, False]
    assert store.push() == 1
    store.flush()
    assert there(1, 2) == [True, True]
    store.close()


def test_closing_does_not_wait_for_a_remote_that_hangs(tmp_path: Path) -> None:
    """The process ends by itself, although two threads of it hang for a minute."""
    code = (
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        "from tests.store.remote.test_tiered import *\n"
        "from tests.store.faulty_files import hanging\n"
        "held = hanging(); held.__enter__()\n"
        f"store = open_disk_store({str(tmp_path)!r}, ram_bytes=0, remote=REMOTE, remote_timeout_s=0.05)\n"
        "store.put(key_of(1), make_cache(1), fingerprint=FINGERPRINT)\n"
        "store.get(key_of(2), fingerprint=FINGERPRINT, input_ids=ids_of(2))\n"
        "store.close(); print('closed')\n"
    )
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=150)
    assert (result.returncode, result.stdout) == (0, "closed\n"), result.stderr


def test_blobs_of_another_format_are_replaced(tmp_path: Path) -> None:
    one = opened(tmp_path / "one", blob_format="int8")
    put(one, 1)
    other = opened(tmp_path / "other")
    assert got(other, 1) == [False]
    put(other, 1)
    assert got(opened(tmp_path / "third"), 1) == [True]
    other.close()
    one.close()


@pytest.mark.parametrize(
    ("url", "settings", "said"),
    [
        ("bucket/prefix", {}, "give a URL such as s3://bucket/prefix"),
        ("nothing://bucket", {}, "nothing:// cannot be used"),
        ("file://caches", {}, "write the whole path"),
        (REMOTE, {"remote_timeout_s": 0}, "remote_timeout_s is 0"),
        (REMOTE, {"remote_max_bytes": -1}, "remote_max_bytes is -1"),
        (None, {"remote_max_bytes": 1}, "there is no remote tier"),
    ],
)
def test_bad_settings_are_said_before_anything_is_made(
    tmp_path: Path, url: str | None, settings: dict[str, int], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        open_disk_store(tmp_path / "store", remote=url, **settings)
    assert not (tmp_path / "store").exists()


def test_chroma_s_stores_take_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="directory="):
        open_store(chromadb.EphemeralClient(), remote=REMOTE)
    store = open_store(chromadb.PersistentClient(tmp_path), remote=REMOTE, max_bytes=10**6)
    assert isinstance(store, TieredStore)
    store.close()


def test_a_password_in_the_url_is_kept_out_of_sight() -> None:
    assert RemoteFiles("faulty://me:secret@host/caches/").name == "faulty://host/caches"
    with pytest.raises(InputError) as error:
        RemoteFiles("nothing://me:secret@host/caches/")
    assert "secret" not in str(error.value)


def test_what_was_listed_before_is_not_believed() -> None:
    files = RemoteFiles(REMOTE)
    files.write(FINGERPRINT, key_of(1), b"short")
    assert [blob.nbytes for blob in files.blobs()] == [5]
    files.write(FINGERPRINT, key_of(1), b"longer than that")
    assert files.read(FINGERPRINT, key_of(1)) == b"longer than that"
    assert len(list(files.blobs())) == 1
    files.write(FINGERPRINT, key_of(1), b"x")
    assert files.size(FINGERPRINT, key_of(1)) == 1


def test_metrics_tell_the_tiers_apart(tmp_path: Path) -> None:
    prometheus_client = pytest.importorskip("prometheus_client")
    from prophetkv_rag.server.metrics import ServerMetrics

    store = opened(tmp_path)
    put(store, 1, 2)
    got(store, 3)
    store.files.remove([key_of(2)])
    got(store, 1, 2)
    text = prometheus_client.generate_latest(ServerMetrics(store.stats, ()).registry).decode()
    for line in (
        "prophetkv_remote_up 1.0",
        f"prophetkv_remote_bytes {float(2 * SIZE)}",
        "prophetkv_remote_chunks 2.0",
        "prophetkv_remote_waiting 0.0",
        'prophetkv_remote_calls_total{outcome="uploads"} 2.0',
        'prophetkv_remote_calls_total{outcome="misses"} 1.0',
        'prophetkv_store_lookups_total{result="remote"} 1.0',
        'prophetkv_store_lookups_total{result="disk"} 1.0',
    ):
        assert line in text.splitlines()
    store.close()
    plain = DiskStore(tmp_path)
    assert "remote" not in prometheus_client.generate_latest(ServerMetrics(plain.stats, ()).registry).decode()
    plain.close()


def test_the_breaker_waits_longer_after_each_try() -> None:
    now = 0.0
    breaker = Breaker(10.0, 35.0, clock=lambda: now)
    assert breaker.allows()
    assert [breaker.failed(), breaker.failed()] == [True, False], "only the first is news"
    pauses = []
    for _ in range(4):
        pauses.append(breaker.wait_s)
        assert not breaker.allows()
        now += breaker.wait_s
        assert [breaker.allows(), breaker.allows()] == [True, False], "one may try"
        assert not breaker.failed()
    assert pauses == [10.0, 20.0, 35.0, 35.0]
    assert not breaker.succeeded(), "what was asked before the failure says nothing"
    now += 35.0
    assert breaker.allows()
    assert breaker.succeeded()
    assert not breaker.is_open
    assert breaker.failed()
    assert breaker.wait_s == 10.0
