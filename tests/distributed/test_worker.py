"""A worker on its own, without Ray: what it refuses, and what it does with what is there already."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prophetkv_rag import InputError, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.config import parse_encoding
from prophetkv_rag.distributed import ChunkWorker, Cluster, Documents, WorkerSettings, left_for_workers
from prophetkv_rag.distributed.encoding import DocumentJobs
from prophetkv_rag.distributed.worker import EncodeJob, Failed, encode, start
from prophetkv_rag.store.disk import TieredStore
from tests.tiny import save_tiny, save_tiny_encoder, text_of, tiny_llama, tiny_tokenizer

CONFIG = ProphetKVConfig(encoding="previous:2")
TEXTS = tuple(text_of(20, seed=number) for number in range(4))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def caller(tmp_path: Path) -> Iterator[ProphetKVEngine]:
    store = TieredStore(tmp_path / "caller", 0, remote=f"file://{tmp_path}/remote", max_bytes=0)
    yield ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=CONFIG, store=store)
    store.close()


@pytest.fixture
def settings(caller: ProphetKVEngine, model: Path, tmp_path: Path) -> WorkerSettings:
    options = {"remote": f"file://{tmp_path}/remote", "blob_format": "exact", "encryption_key": None}
    return WorkerSettings(str(model), "auto", "cpu", CONFIG, caller.identity.fingerprint, "docs", None, options)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChunkWorker]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")  # which the worker sets, and this process has it taken back
    worker = ChunkWorker()
    yield worker
    worker.close(None)


def meet(worker: ChunkWorker, settings: WorkerSettings, caller: ProphetKVEngine) -> Any:
    store = caller.store
    assert isinstance(store, TieredStore)
    with left_for_workers(store.remote.files, store, caller.identity.fingerprint) as name:
        return worker.call(start, (settings, name))


def refusal(worker: ChunkWorker, settings: WorkerSettings, caller: ProphetKVEngine) -> str:
    found = meet(worker, settings, caller)
    assert isinstance(found, Failed)
    assert found.message.startswith("the worker on ")
    return found.message


def test_another_model_is_refused(
    worker: ChunkWorker, settings: WorkerSettings, caller: ProphetKVEngine, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", seed=7)
    assert "its model is not the caller's" in refusal(worker, replace(settings, model=str(other)), caller)


def test_another_dtype_is_refused(worker: ChunkWorker, settings: WorkerSettings, caller: ProphetKVEngine) -> None:
    assert "in bfloat16 on cpu would be" in refusal(worker, replace(settings, dtype="bfloat16"), caller)


def test_another_version_is_refused(worker: ChunkWorker, settings: WorkerSettings, caller: ProphetKVEngine) -> None:
    assert "and 9.9 where the caller is" in refusal(worker, replace(settings, version="9.9"), caller)


def test_a_model_that_is_not_there_is_not_downloaded(
    worker: ChunkWorker, settings: WorkerSettings, caller: ProphetKVEngine
) -> None:
    assert "cannot load a model from '/nowhere'" in refusal(worker, replace(settings, model="/nowhere"), caller)


def test_a_share_that_is_not_mounted_is_refused(
    worker: ChunkWorker, settings: WorkerSettings, caller: ProphetKVEngine, tmp_path: Path
) -> None:
    elsewhere = replace(settings, store={**settings.store, "remote": f"file://{tmp_path}/not_mounted"})
    assert "is another place here than where the caller is" in refusal(worker, elsewhere, caller)


def test_another_key_is_refused(
    worker: ChunkWorker, settings: WorkerSettings, caller: ProphetKVEngine, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text(secrets.token_hex(32))
    encrypted = replace(settings, store={**settings.store, "encryption_key": str(key)})
    assert "encrypted here with another key" in refusal(worker, encrypted, caller)
    gone = replace(settings, store={**settings.store, "encryption_key": str(tmp_path / "none")})
    assert "none" in refusal(ChunkWorker(), gone, caller)


def test_a_remote_tier_that_cannot_be_written_to(caller: ProphetKVEngine, tmp_path: Path) -> None:
    (tmp_path / "remote").write_text("a file where the folder is to be")
    store = caller.store
    assert isinstance(store, TieredStore)
    with (
        pytest.raises(InputError, match="cannot be written to"),
        left_for_workers(store.remote.files, store, caller.identity.fingerprint),
    ):
        pass


def test_encrypted_caches_are_made_and_found(
    worker: ChunkWorker, settings: WorkerSettings, model: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text(secrets.token_hex(32))
    remote = f"file://{tmp_path}/remote"
    store = TieredStore(tmp_path / "encrypted", 0, remote=remote, encryption_key=key)
    caller = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=CONFIG, store=store)
    encrypted = replace(settings, store={**settings.store, "encryption_key": str(key)})
    assert not isinstance(meet(worker, encrypted, caller), Failed)
    found = worker.call(encode, EncodeJob((TEXTS,)))
    assert (found.computed, found.chunks, found.not_kept) == (4, 4, 0)
    for path in (tmp_path / "remote").rglob("*.safetensors"):
        assert TEXTS[0].encode() not in path.read_bytes()
    computed: list[int] = []
    caller.add_chunks(TEXTS, progress=lambda done, total: computed.append(done))
    assert computed == []
    store.close()


def test_what_is_there_is_not_computed_and_what_stands_behind_it_is_encoded_behind_it(
    worker: ChunkWorker, settings: WorkerSettings, caller: ProphetKVEngine
) -> None:
    assert not isinstance(meet(worker, settings, caller), Failed)
    assert worker.encode(EncodeJob((TEXTS[:2],))).computed == 2
    another = ChunkWorker()
    assert not isinstance(meet(another, settings, caller), Failed)
    found = another.encode(EncodeJob((TEXTS,)))
    assert (found.computed, found.chunks) == (2, 4)
    engine = another.engine
    keys = [engine.key_of(text) for text in TEXTS]
    third = another.store.find(keys[2], fingerprint=engine.identity.fingerprint, input_ids=None).cache
    assert third is not None
    assert third.behind.keys == (keys[0], keys[1])
    another.close(None)


def test_what_the_caller_has_deleted_meanwhile_is_computed_and_uploaded_again(
    worker: ChunkWorker, settings: WorkerSettings, caller: ProphetKVEngine, tmp_path: Path
) -> None:
    assert not isinstance(meet(worker, settings, caller), Failed)
    assert worker.encode(EncodeJob((TEXTS,))).computed == 4
    assert worker.encode(EncodeJob((TEXTS,))).computed == 0
    blob = next((tmp_path / "remote").rglob(f"{caller.key_of(TEXTS[1])}.safetensors"))
    blob.unlink()
    found = worker.encode(EncodeJob((TEXTS,)))
    assert (found.computed, found.not_kept) == (1, 0)
    assert blob.exists()


def test_what_stands_behind_another_documents_chunk_is_encoded_behind_it(
    worker: ChunkWorker, settings: WorkerSettings, caller: ProphetKVEngine
) -> None:
    """By another worker than that document was, as on one machine."""
    shared, own = [TEXTS[0], TEXTS[1]], ["A text of its own.", TEXTS[1], "What follows it."]
    documents = Documents.of([shared, own], caller.tokens.chunk, caller.identity.key)
    jobs = DocumentJobs(
        documents, parse_encoding("previous:2"), lambda key: (), embedder="", num_workers=2, batch_tokens=0
    )
    first = jobs.take()
    assert (first, jobs.take()) == ([0], None)
    assert not isinstance(meet(worker, settings, caller), Failed)
    assert worker.encode(jobs.argument(first)).computed == 2
    jobs.done(first)
    second = jobs.take()
    assert second == [1]
    another = ChunkWorker()
    assert not isinstance(meet(another, settings, caller), Failed)
    found = another.encode(jobs.argument(second))
    assert (found.computed, found.chunks) == (2, 2)  # the shared one counts for the document that it came with

    alone = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=CONFIG)
    alone.add_chunks(shared)
    alone.add_chunks(own)
    for text in (own[0], own[2]):
        key, fingerprint = alone.key_of(text), alone.identity.fingerprint
        caches = [
            store.find(key, fingerprint=fingerprint, input_ids=None).cache for store in (another.store, alone.store)
        ]
        ours, wanted = caches
        assert ours is not None
        assert wanted is not None
        assert ours.behind.keys == wanted.behind.keys
    another.close(None)


def test_texts_are_embedded_where_that_is_asked_for(
    worker: ChunkWorker, settings: WorkerSettings, caller: ProphetKVEngine, tmp_path: Path
) -> None:
    from prophetkv_rag.defaults import MiniLMEmbedder

    assert not isinstance(meet(worker, settings, caller), Failed)
    encoder = save_tiny_encoder(tmp_path / "encoder")
    found = worker.encode(EncodeJob((TEXTS[:3], TEXTS[3:]), embedder=str(encoder)))
    assert [len(vectors) for vectors in found.vectors] == [3, 1]
    assert found.vectors[0][1] == pytest.approx(MiniLMEmbedder(encoder).embed([TEXTS[1]])[0], abs=1e-6)
    refused = ChunkWorker()
    assert not isinstance(meet(refused, settings, caller), Failed)
    failed = refused.call(encode, EncodeJob((TEXTS[:1],), embedder=str(tmp_path / "none")))
    assert "is not at" in failed.message
    refused.close(None)


@pytest.mark.parametrize(
    ("cluster", "wanted", "uses_gpus", "expected"),
    [
        (Cluster(2, 8, 24, 0), None, True, (2, {"num_gpus": 0, "num_cpus": 8})),
        (Cluster(2, 8, 24, 0), 4, True, (4, {"num_gpus": 0, "num_cpus": 4})),
        (Cluster(1, 2, 2, 0), 2, True, (2, {"num_gpus": 0, "num_cpus": 1})),
        (Cluster(2, 8, 24, 6), None, True, (6, {"num_gpus": 1, "num_cpus": 1})),
        (Cluster(2, 8, 24, 6), None, False, (2, {"num_gpus": 0, "num_cpus": 8})),
    ],
)
def test_what_each_worker_gets(cluster: Cluster, wanted: int | None, uses_gpus: bool, expected: Any) -> None:
    assert cluster.share(wanted, uses_gpus=uses_gpus) == expected


def test_more_workers_than_gpus() -> None:
    with pytest.raises(InputError, match="each has a GPU, and the cluster has 6"):
        Cluster(2, 8, 24, 6).share(7, uses_gpus=True)
