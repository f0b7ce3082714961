"""The collection proxy over time: like plain Chroma under any sequence of calls, across threads and restarts."""

from __future__ import annotations

import copy
import gc
import random
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import chromadb
import pytest

from prophetkv_rag.chroma import KVCachingCollection, default_blob_directory, locks, open_store
from prophetkv_rag.chroma.records import PROPHETKV_ID
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.memory import MemoryStore
from tests.chroma.clients import TOO_LONG, A, B, C, D, add, assert_caches_are, embed, key_of
from tests.tiny import tiny_llama, tiny_tokenizer

IDS = ["1", "2", "3", "4"]


def ephemeral_collection() -> Any:
    return chromadb.EphemeralClient().create_collection(f"plain-{uuid.uuid4()}", embedding_function=None)


def random_call(generator: random.Random) -> tuple[str, dict[str, Any]]:
    """A call that plain Chroma accepts."""
    ids = generator.sample(IDS, generator.randint(1, 3))
    kind = generator.choice(["add", "upsert", "update", "text", "metadata", "delete", "delete where", "delete text"])
    if kind == "delete":
        return "delete", {"ids": ids}
    if kind == "delete where":
        return "delete", {"where": {"page": generator.randint(1, 3)}}
    if kind == "delete text":
        return "delete", {"where_document": {"$contains": generator.choice([A, B, C])[:20]}}
    texts = [generator.choice([A, B, C, f" {A}\n", None, "", TOO_LONG]) for _ in ids]
    metadatas = [generator.choice([None, {"page": generator.randint(1, 3)}, {"other": True}]) for _ in ids]
    if kind == "metadata":
        return generator.choice(["update", "upsert"]), {"ids": ids, "metadatas": metadatas, "embeddings": embed(*texts)}
    arguments = {"ids": ids, "embeddings": embed(*texts), "documents": texts}
    if kind != "text":
        arguments["metadatas"] = metadatas
    return kind if kind != "text" else generator.choice(["update", "upsert"]), arguments


def by_id(found: Any) -> dict[str, Any]:
    return {
        name: (metadata, document)
        for name, metadata, document in zip(found["ids"], found["metadatas"], found["documents"], strict=True)
    }


@pytest.mark.parametrize("seed", range(6))
def test_like_plain_chroma_under_any_calls(caching_engine: ProphetKVEngine, seed: int) -> None:
    """The same calls on a plain collection read back the same; after each, the caches are those of the texts."""
    generator = random.Random(seed)
    plain, caching = ephemeral_collection(), KVCachingCollection(ephemeral_collection(), caching_engine)
    for _ in range(60):
        method, arguments = random_call(generator)
        getattr(plain, method)(**copy.deepcopy(arguments))
        getattr(caching, method)(**arguments)
        expected = by_id(plain.get())
        assert by_id(caching.get()) == expected
        cacheable = {A, B, C, f" {A}\n"}
        assert_caches_are(
            caching, **{name: text if text in cacheable else None for name, (_, text) in expected.items()}
        )
        for page in (1, 2, 3):
            where = {"page": page}
            assert sorted(caching.get(where=where)["ids"]) == sorted(plain.get(where=where)["ids"])


def test_threads_that_add_and_delete_one_text_leave_references_and_records_in_step(
    caching_engine: ProphetKVEngine,
) -> None:
    plain = ephemeral_collection()
    errors: list[BaseException] = []

    def use(name: str) -> None:
        caching = KVCachingCollection(plain, caching_engine)  # each thread with a proxy of its own
        try:
            for _ in range(15):
                add(caching, **{name: A})
                assert [match.key for match in caching_engine.chunk_index.find(A)] == [key_of(caching_engine, A)]
                caching.delete([name])
            add(caching, **{name: B})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(name,)) for name in IDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_caches_are(KVCachingCollection(plain, caching_engine), **dict.fromkeys(IDS, B))


def test_a_text_that_is_added_while_its_last_record_is_deleted_keeps_its_cache(
    caching_engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between "no record has this key" and dropping the cache, nobody may add such a record."""
    plain = ephemeral_collection()
    caching = KVCachingCollection(plain, caching_engine)
    add(caching, first=A)
    is_dropping = threading.Event()
    remove_chunks = caching_engine.remove_chunks

    def slow(*args: Any, **kwargs: Any) -> list[str]:
        is_dropping.set()
        time.sleep(0.5)
        return remove_chunks(*args, **kwargs)

    monkeypatch.setattr(caching_engine, "remove_chunks", slow)
    deleting = threading.Thread(target=lambda: caching.delete(["first"]))
    deleting.start()
    assert is_dropping.wait(60)
    add(KVCachingCollection(plain, caching_engine), second=A)
    deleting.join()
    assert_caches_are(caching, second=A)


def test_locks_of_collections_that_are_gone_are_not_kept(caching_engine: ProphetKVEngine) -> None:
    plain = ephemeral_collection()
    one, two = (KVCachingCollection(plain, caching_engine) for _ in range(2))
    with one._lock as _:
        assert one.owner in locks._LOCKS
        assert one._lock is two._lock is locks._LOCKS[one.owner]
    gc.collect()
    assert one.owner not in locks._LOCKS


def test_caches_are_kept_beside_chroma_and_found_again(tmp_path: Path) -> None:
    client = chromadb.PersistentClient(tmp_path)
    plain = client.create_collection("docs", embedding_function=None)
    directory = tmp_path / "prophetkv"
    assert default_blob_directory(client) == default_blob_directory(plain) == directory
    store = open_store(client)
    assert isinstance(store, DiskStore)
    assert store.directory == directory
    caching = KVCachingCollection(plain, ProphetKVEngine(tiny_llama(), tiny_tokenizer(), store=store))
    assert default_blob_directory(caching) == directory
    add(caching, a=A, b=B)
    store.close()

    again = open_store(client, directory)
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), store=again)
    computed: list[int] = []
    caching = KVCachingCollection(
        client.get_collection("docs", embedding_function=None), engine, progress=lambda done, _: computed.append(done)
    )
    assert_caches_are(caching, a=A, b=B)
    add(caching, a=A, c=B, d=C)
    assert computed == [1]  # only C is new
    caching.delete(["b", "c"])
    assert_caches_are(caching, a=A, d=C)
    assert len(list(directory.rglob("*.safetensors"))) == 2
    again.close()


def test_where_caches_go_for_the_other_clients(http_client: Any, tmp_path: Path) -> None:
    ephemeral, remote = chromadb.EphemeralClient(), http_client()
    assert default_blob_directory(ephemeral) is None
    assert default_blob_directory(remote) is None
    assert isinstance(open_store(ephemeral), MemoryStore)
    with pytest.raises(InputError, match="directory="):
        open_store(remote)
    for client in (ephemeral, remote):
        store = open_store(client, tmp_path / "elsewhere")
        assert isinstance(store, DiskStore)
        store.close()


def test_a_collection_written_without_the_proxy_or_for_another_model_can_be_cached(
    collection: KVCachingCollection,
) -> None:
    texts = [A, B, TOO_LONG, A]
    collection.collection.add(IDS, embed(*texts), [{"page": 1}, {PROPHETKV_ID: "f" * 64}, None, None], texts)
    collection.collection.add(["5"], embed(None))
    collection.cache_existing()
    assert_caches_are(collection, **{"1": A, "2": B, "3": None, "4": A, "5": None})
    assert collection.get("1")["metadatas"] == [{"page": 1}]

    old_keys = collection.engine.store.references(collection.owner)
    other = ProphetKVEngine(tiny_llama(seed=1), tiny_tokenizer(), store=collection.engine.store)
    changed = KVCachingCollection(collection.collection, other)
    changed.cache_existing()
    assert_caches_are(changed, **{"1": A, "2": B, "3": None, "4": A, "5": None})
    assert not any(key in other.store for key in old_keys)


def test_texts_that_chroma_embeds_itself(client: Any, caching_engine: ProphetKVEngine) -> None:
    class Lengths(chromadb.EmbeddingFunction[Any]):
        def __init__(self) -> None: ...

        def __call__(self, input: Any) -> Any:
            return embed(*input)

    plain = client.create_collection(f"embeds-{uuid.uuid4()}", embedding_function=Lengths())
    caching = KVCachingCollection(plain, caching_engine)
    caching.add(ids=["a", "b"], documents=[A, C])
    caching.upsert(ids="b", documents=B)
    caching.update(ids=["a"], documents=[D])
    assert_caches_are(caching, a=D, b=B)
    found = caching.query(query_texts=D, n_results=2)
    assert found["ids"][0][0] == "a"
    assert found["metadatas"] == [[None, None]]


def test_progress_counts_what_is_computed(collection: KVCachingCollection) -> None:
    calls: list[tuple[int, int]] = []
    caching = KVCachingCollection(collection.collection, collection.engine, progress=lambda *call: calls.append(call))
    add(caching, a=A, b=B)
    add(caching, c=B, d=C)
    assert calls == [(1, 2), (2, 2), (1, 1)]


def test_everything_else_is_the_collections_own(collection: KVCachingCollection) -> None:
    plain = collection.collection
    assert (collection.name, collection.id, collection.metadata) == (plain.name, plain.id, plain.metadata)
    collection.modify(metadata={"about": "tests"})
    assert plain.metadata == {"about": "tests"}
    assert collection.count() == 0
    assert copy.copy(collection).collection is plain
    assert KVCachingCollection(collection, collection.engine).collection is plain
    assert plain.name in repr(collection)
    with pytest.raises(AttributeError):
        _ = collection.no_such_thing


async def test_an_asynchronous_collection_is_refused(http_client: Any, caching_engine: ProphetKVEngine) -> None:
    settings = http_client().get_settings()
    client = await chromadb.AsyncHttpClient("127.0.0.1", settings.chroma_server_http_port)
    plain = await client.create_collection(f"async-{uuid.uuid4()}", embedding_function=None)
    with pytest.raises(InputError, match="asynchronous"):
        KVCachingCollection(plain, caching_engine)
