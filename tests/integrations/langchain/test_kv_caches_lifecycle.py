"""`with_kv_caches` when calls fail, are cancelled or come at once, and after a restart: caches follow the records."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_text_splitters import RecursiveCharacterTextSplitter

from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain import ChatProphetKV, with_kv_caches
from prophetkv_rag.store.disk import gc
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.vector_stores.calls import THREAD_NAME
from tests.integrations.conftest import until
from tests.integrations.langchain.minimal import DiskFullError, MinimalStore, ReadableStore, SlowStore
from tests.integrations.langchain.rag import HashingEmbeddings, new_store
from tests.integrations.langchain.stores import chroma, faiss, faiss_class, in_memory, milvus, qdrant
from tests.integrations.rag import TEXTS, chunk_key
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

A, B, C, D = TEXTS
NEW = "A wholly new text about the harbour and the boats of the town."


def link_of(store: Any) -> Any:
    return store._prophetkv_link


def check(store: Any, *texts: str) -> None:
    """The store's caches are those of these texts, and no others."""
    link = link_of(store)
    keys = {chunk_key(link.engine, text) for text in texts}
    assert set(link.engine.store.references(link.owner)) == keys
    assert {key for _, _, key in link.ledger.rows(link.owner) if key} == keys
    assert all(key in link.engine.store for key in keys)
    assert link.engine.store.stats().chunks == len(keys)


# ---- what fails half way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [None, ["a", "b", "c"]])
def test_a_write_that_fails_half_way_keeps_the_caches_of_what_was_written(
    ids: Any, fresh_engine: ProphetKVEngine
) -> None:
    plain = ReadableStore(fails_at=2)
    store = with_kv_caches(plain, fresh_engine, read=lambda: plain.held.values())
    with pytest.raises(DiskFullError):
        store.add_texts([A, B, C], ids=ids)
    assert [one.page_content for one in plain.held.values()] == [A, B]
    check(store, A, B)


def test_an_update_that_fails_half_way_keeps_old_and_new_apart(fresh_engine: ProphetKVEngine) -> None:
    store = with_kv_caches(ReadableStore(), fresh_engine)
    store.add_texts([A, B], ids=["a", "b"])
    store.fails_at = 1
    with pytest.raises(DiskFullError):
        store.add_texts([NEW, C], ids=["a", "b"])
    check(store, NEW, B)


def test_what_cannot_be_read_back_has_no_caches_and_says_so(
    fresh_engine: ProphetKVEngine, caplog: pytest.LogCaptureFixture
) -> None:
    store = with_kv_caches(MinimalStore(), fresh_engine)
    store.add_texts([D])
    store.fails_at = 1
    with pytest.raises(DiskFullError), caplog.at_level(logging.WARNING):
        store.add_texts([A, B])
    check(store, D)
    assert "it is not known which of 2 records were written" in caplog.text
    assert "read=..." in caplog.text


def test_qdrant_fails_in_its_second_batch(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    class Failing(HashingEmbeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            if C in texts:
                raise DiskFullError
            return super().embed_documents(texts)

    store = with_kv_caches(qdrant(tmp_path, Failing()), fresh_engine)
    with pytest.raises(DiskFullError):
        store.add_texts([A, B, C, D], batch_size=1)
    assert {one.page_content for one in store.similarity_search("the", k=9)} == {A, B}
    check(store, A, B)


async def test_an_async_write_that_fails_half_way(fresh_engine: ProphetKVEngine) -> None:
    store = with_kv_caches(SlowStore(HashingEmbeddings()), fresh_engine)
    store.fails_at = 1
    with pytest.raises(DiskFullError):
        await store.aadd_documents([Document(A), Document(B)])
    check(store, A)


def test_a_delete_that_fails_half_way_drops_what_is_gone(fresh_engine: ProphetKVEngine) -> None:
    store = with_kv_caches(ReadableStore(), fresh_engine)
    ids = store.add_texts([A, B, C])
    store.fails_at = 1
    with pytest.raises(DiskFullError):
        store.delete(ids)
    check(store, B, C)


def test_a_delete_that_is_refused_keeps_the_caches(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    store = with_kv_caches(faiss(tmp_path, HashingEmbeddings()), fresh_engine)
    ids = store.add_texts([A, B])
    with pytest.raises(ValueError, match="do not exist"):
        store.delete([ids[0], "no such id"])
    check(store, A, B)


def test_arguments_that_the_vector_store_refuses_are_its_own_to_refuse(
    fresh_engine: ProphetKVEngine, tmp_path: Path
) -> None:
    store = with_kv_caches(faiss(tmp_path, HashingEmbeddings()), fresh_engine)
    with pytest.raises(ValueError, match="equal length"):
        store.add_texts([A, B], ids=["a"])
    with pytest.raises(TypeError):
        store.add_documents()
    with pytest.raises(AttributeError):
        store.add_texts([A, 7])
    check(store)


def test_what_a_vector_store_cuts_short_is_read_back(fresh_engine: ProphetKVEngine) -> None:
    class Cutting(ReadableStore):
        def add_texts(self, texts: Any, metadatas: Any = None, *, ids: Any = None, **kwargs: Any) -> list[str]:
            return super().add_texts(list(texts)[: len(ids)], metadatas, ids=ids)

    plain = Cutting()
    store = with_kv_caches(plain, fresh_engine, read=lambda: plain.held.values())
    assert store.add_texts([A, B], ids=["a"]) == ["a"]
    check(store, A)


# ---- what is deleted how --------------------------------------------------------------------------------------------


def test_deletes_by_a_filter(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    store = with_kv_caches(chroma(tmp_path, HashingEmbeddings()), fresh_engine)
    store.add_texts([A, B, C], metadatas=[{"n": 1}, {"n": 2}, {"n": 1}])
    store.delete(where={"n": 1})
    check(store, B)
    store.reset_collection()
    check(store)


def test_a_delete_by_a_filter_that_cannot_be_followed_says_so(
    fresh_engine: ProphetKVEngine, caplog: pytest.LogCaptureFixture
) -> None:
    plain = MinimalStore()
    store = with_kv_caches(plain, fresh_engine)
    store.add_texts([A, B], metadatas=[{"topic": "sea"}, {"topic": "art"}])
    with caplog.at_level(logging.WARNING):
        store.delete(topic="sea")
    assert "may be left over" in caplog.text
    with pytest.raises(InputError, match="read="):
        store.cache_existing()
    check(store, A, B)
    again = with_kv_caches(store, fresh_engine, read=lambda: plain.held.values())
    again.cache_existing()
    check(again, B)


def test_a_text_stays_cached_while_another_record_has_it(fresh_engine: ProphetKVEngine) -> None:
    store = with_kv_caches(InMemoryVectorStore(HashingEmbeddings()), fresh_engine)
    ids = store.add_texts([A, A, f" {A}\n"])
    store.delete(ids[:2])
    check(store, A)
    store.delete(ids[2:])
    check(store)


def test_what_another_store_holds_stays(fresh_engine: ProphetKVEngine) -> None:
    one, two = (with_kv_caches(InMemoryVectorStore(HashingEmbeddings()), fresh_engine) for _ in range(2))
    ids = one.add_texts([A])
    two.add_texts([A])
    one.delete(ids)
    check(two, A)


def test_texts_that_cannot_be_chunks_are_written_without(
    fresh_engine: ProphetKVEngine, caplog: pytest.LogCaptureFixture
) -> None:
    store = with_kv_caches(InMemoryVectorStore(HashingEmbeddings()), fresh_engine)
    with caplog.at_level(logging.WARNING):
        ids = store.add_texts([A, "  ", text_of(5000)])
    assert len(store.get_by_ids(ids)) == 3
    check(store, A)
    assert "2 texts in vector store" in caplog.text


@pytest.mark.parametrize("keeps", ["the old", "both"])
def test_a_known_id_is_looked_up_after_a_write(keeps: str, fresh_engine: ProphetKVEngine) -> None:
    """Some vector stores keep the old text under an id that they have, some keep two."""
    held: list[Document] = []

    class Odd(MinimalStore):
        def add_texts(self, texts: Any, metadatas: Any = None, *, ids: Any = None, **kwargs: Any) -> list[str]:
            known = {one.id for one in held}
            pairs = [(name, text) for name, text in zip(ids, texts, strict=True)]
            held.extend(Document(text, id=name) for name, text in pairs if keeps == "both" or name not in known)
            return list(ids)

    store = with_kv_caches(Odd(), fresh_engine, read=lambda: held)
    store.add_texts([A, B], ids=["a", "b"])
    store.add_texts([NEW, B], ids=["a", "b"])
    check(store, A, B, *([NEW] if keeps == "both" else []))


def test_qdrant_gives_ids_back_in_another_spelling(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    store = with_kv_caches(qdrant(tmp_path, HashingEmbeddings()), fresh_engine)
    ids = store.add_texts([A, B])
    assert not any("-" in name for name in ids)
    store.cache_existing()
    store.delete(ids)
    check(store)


def test_what_a_crash_left_is_dropped_with_the_next_look_at_all(fresh_engine: ProphetKVEngine) -> None:
    """A cache that was computed for a record, which was then not written, or written and not noted."""
    plain = InMemoryVectorStore(HashingEmbeddings())
    store = with_kv_caches(plain, fresh_engine)
    store.add_texts([A])
    fresh_engine.add_chunks([B, C], owner=link_of(store).owner)
    plain.add_texts([C])
    store.cache_existing()
    check(store, A, C)


# ---- at once --------------------------------------------------------------------------------------------------------


def test_threads_that_add_and_delete_one_text(fresh_engine: ProphetKVEngine) -> None:
    plain = InMemoryVectorStore(HashingEmbeddings())
    errors: list[BaseException] = []
    store = with_kv_caches(plain, fresh_engine)

    def use(name: str) -> None:
        try:
            for _ in range(15):
                store.add_texts([A], ids=[name])
                assert fresh_engine.chunk_index.find(A)
                store.delete([name])
            store.add_texts([B], ids=[name])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    check(store, B)


async def test_many_async_writers_and_a_blocked_loop(fresh_engine: ProphetKVEngine, turns: list[int]) -> None:
    """Every pass of the model waits for a turn of the event loop; more writers than threads of the pool."""
    store = with_kv_caches(SlowStore(HashingEmbeddings()), fresh_engine)
    texts = [f"Text number {number} about the harbour." for number in range(40)]
    await asyncio.gather(*(store.aadd_documents([Document(text)]) for text in texts))
    check(store, *texts)
    assert turns


async def test_plain_calls_in_the_event_loop_of_one_that_awaits(fresh_engine: ProphetKVEngine) -> None:
    """Waiting for it would be for ever; what it is writing keeps its caches meanwhile."""

    class Waiting(SlowStore):
        async def aadd_documents(self, documents: list[Document], ids: Any = None, **kwargs: Any) -> list[str]:
            has_begun.set()
            await may_end.wait()
            return self.add_documents(documents)

    has_begun, may_end = asyncio.Event(), asyncio.Event()
    store = with_kv_caches(Waiting(HashingEmbeddings()), fresh_engine)
    ids = store.add_texts([A])
    task = asyncio.create_task(store.aadd_documents([Document(A), Document(B)]))
    await has_begun.wait()
    store.delete(ids)
    store.add_texts([C])
    assert chunk_key(fresh_engine, A) in fresh_engine.store
    may_end.set()
    await task
    check(store, A, B, C)


async def test_threads_of_the_pool_that_wait_for_one_that_awaits(fresh_engine: ProphetKVEngine) -> None:
    class Waiting(SlowStore):
        async def aadd_documents(self, documents: list[Document], ids: Any = None, **kwargs: Any) -> list[str]:
            has_begun.set()
            await until(lambda: len(begun) == 3)
            return self.add_documents(documents)

    begun: list[str] = []
    has_begun = asyncio.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=3))
    store = with_kv_caches(Waiting(HashingEmbeddings()), fresh_engine)
    task = asyncio.create_task(store.aadd_documents([Document(A)]))
    await has_begun.wait()

    def add(text: str) -> None:
        begun.append(text)
        store.add_texts([text])

    await asyncio.gather(task, *(asyncio.to_thread(add, text) for text in (B, C, D)))
    check(store, A, B, C, D)


async def test_a_cancelled_write_leaves_nothing_half_done(fresh_engine: ProphetKVEngine) -> None:
    class Waiting(SlowStore):
        async def aadd_documents(self, documents: list[Document], ids: Any = None, **kwargs: Any) -> list[str]:
            self.add_documents(documents[:1])
            has_begun.set()
            await asyncio.sleep(300)
            raise AssertionError

    has_begun = asyncio.Event()
    store = with_kv_caches(Waiting(HashingEmbeddings()), fresh_engine)
    task = asyncio.create_task(store.aadd_documents([Document(A), Document(B)]))
    await has_begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    check(store, A)
    store.add_texts([C])  # the lock is free
    check(store, A, C)


async def test_a_write_cancelled_while_it_is_computed(fresh_engine: ProphetKVEngine) -> None:
    store = with_kv_caches(SlowStore(HashingEmbeddings()), fresh_engine)
    task = asyncio.create_task(store.aadd_documents([Document(A), Document(B)]))
    loop = asyncio.get_running_loop()

    def cancel(*_: Any) -> None:
        loop.call_soon_threadsafe(task.cancel)

    hook = fresh_engine.model.model.layers[0].register_forward_pre_hook(cancel)
    try:
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        hook.remove()
    for thread in threading.enumerate():  # whatever one still does
        if thread.name.startswith(THREAD_NAME):
            await asyncio.to_thread(thread.join)
    assert store.store == {}
    check(store)


# ---- the same object, only more -------------------------------------------------------------------------------------


def test_it_is_what_it_wraps(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    plain = faiss(tmp_path, HashingEmbeddings())
    store = with_kv_caches(plain, fresh_engine)
    assert isinstance(store, faiss_class(tmp_path)[0])
    assert type(store).__name__ == "FAISS"
    assert store.index is plain.index
    store.add_texts([A])
    assert plain.index.ntotal == 1
    plain.override_relevance_score_fn = abs
    assert store.override_relevance_score_fn is abs
    store.override_relevance_score_fn = None
    assert plain.override_relevance_score_fn is None
    assert "_prophetkv_link" not in vars(plain)
    assert store.as_retriever().vectorstore is store
    assert store.as_retriever().get_name() == "VectorStoreRetriever"


def test_copies_and_pickles(fresh_engine: ProphetKVEngine) -> None:
    store = with_kv_caches(InMemoryVectorStore(HashingEmbeddings()), fresh_engine)
    ids = store.add_texts([A, B])
    shallow, deep = copy.copy(store), copy.deepcopy(store)
    shallow.delete(ids[:1])
    assert link_of(shallow) is link_of(store)
    assert set(link_of(store).engine.store.references(link_of(store).owner)) == {chunk_key(fresh_engine, B)}
    assert chunk_key(fresh_engine, A) in fresh_engine.store, "the deep copy has it still"
    store.delete(ids[1:])
    check(deep, A, B)
    deep.delete(ids)
    check(deep)

    store.add_texts([C], ids=["c"])
    loaded = pickle.loads(pickle.dumps(store))
    assert isinstance(loaded, InMemoryVectorStore)
    assert [one.page_content for one in loaded.similarity_search("the")] == [C]
    with pytest.raises(InputError, match="unpickled"):
        loaded.add_texts([D])
    assert list(loaded.store) == ["c"], "nothing is written without its cache"
    again = with_kv_caches(loaded, fresh_engine)
    again.add_texts([D])
    assert link_of(again).name == link_of(store).name


def test_a_class_makes_stores_of_their_own(fresh_engine: ProphetKVEngine) -> None:
    kind = with_kv_caches(with_kv_caches(InMemoryVectorStore, fresh_engine), fresh_engine)
    assert kind.__mro__[2] is InMemoryVectorStore
    one = kind.from_documents([Document(A), Document(B)], HashingEmbeddings())
    two = kind(HashingEmbeddings())
    two.add_texts([A])
    assert link_of(one).owner != link_of(two).owner
    one.delete(list(one.store))
    check(two, A)


def test_what_a_wrapped_one_makes_is_another(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    """`store.from_texts(...)` is the class's method: a vector store of its own, with caches of its own."""
    held = [Document(A, id="a")]
    store = with_kv_caches(faiss(tmp_path, HashingEmbeddings()), fresh_engine, name="docs", read=lambda: held)
    store.add_texts([A], ids=["a"])
    other = store.from_texts([B], HashingEmbeddings())
    assert fresh_engine.store.stats().chunks == 2
    other.delete(list(other.index_to_docstore_id.values()))
    check(store, A)
    again = with_kv_caches(store, fresh_engine)  # keeps name and `read`
    held.clear()
    again.cache_existing()
    check(again)


def test_threads_that_begin_at_once_share_one_link(fresh_engine: ProphetKVEngine) -> None:
    for _ in range(20):
        store = with_kv_caches(InMemoryVectorStore, fresh_engine)(HashingEmbeddings())
        barrier = threading.Barrier(4)

        def add(text: str, store: Any = store, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            store.add_texts([text])

        threads = [threading.Thread(target=add, args=(text,)) for text in TEXTS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check(store, *TEXTS)
        store.delete(list(store.store))


async def test_from_texts_past_our_methods(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    """FAISS writes by a private method there."""
    kind = with_kv_caches(faiss_class(tmp_path)[0], fresh_engine)
    store = await kind.afrom_texts([A, B], HashingEmbeddings())
    check(store, A, B)
    other = kind.from_embeddings([(C, HashingEmbeddings().embed_query(C))], HashingEmbeddings())
    store.merge_from(other)
    other_owner = link_of(other).owner
    assert set(fresh_engine.store.references(link_of(store).owner)) == {
        chunk_key(fresh_engine, one) for one in (A, B, C)
    }
    assert fresh_engine.store.references(other_owner) == [chunk_key(fresh_engine, C)]
    store.add_embeddings([(D, HashingEmbeddings().embed_query(D))])
    check(store, A, B, C, D)


def test_what_is_refused(fresh_engine: ProphetKVEngine) -> None:
    with pytest.raises(InputError, match="give a VectorStore"):
        with_kv_caches(HashingEmbeddings(), fresh_engine)
    with pytest.raises(InputError, match="got dict"):
        with_kv_caches(dict, fresh_engine)
    with pytest.raises(InputError, match="by itself"):
        with_kv_caches(new_store(fresh_engine), fresh_engine)
    with pytest.raises(InputError, match="name is ' '"):
        with_kv_caches(MinimalStore(), fresh_engine, name=" ")


def test_a_chain_reuses_what_it_finds(fresh_engine: ProphetKVEngine) -> None:
    store = with_kv_caches(InMemoryVectorStore(HashingEmbeddings()), fresh_engine)
    store.add_texts(list(TEXTS))
    found = store.as_retriever(search_kwargs={"k": 2}).invoke("museum library")
    prompt = "\n\n".join(one.page_content for one in found)
    answer = ChatProphetKV(engine=fresh_engine, max_tokens=2).invoke(f"{prompt}\n\nWhen does the museum open?")
    assert [one["status"] for one in answer.response_metadata["prophetkv"]["chunks"]] == ["hit", "hit"]


# ---- after a restart ------------------------------------------------------------------------------------------------


def disk_engine(directory: Path, **settings: Any) -> ProphetKVEngine:
    return ProphetKVEngine(tiny_llama(**settings), tiny_tokenizer(), store=DiskStore(directory))


def test_a_vector_store_is_found_again(tmp_path: Path) -> None:
    engine = disk_engine(tmp_path / "kv")
    plain = faiss(tmp_path, HashingEmbeddings())
    with pytest.raises(InputError, match="name="):
        with_kv_caches(plain, engine)
    ids = with_kv_caches(plain, engine, name="docs").add_texts([A, B])
    plain.save_local(str(tmp_path / "faiss"))
    assert gc(engine.store, {}, grace_s=-1).unreferenced == 0, "it is no Chroma collection's"
    engine.store.close()

    engine = disk_engine(tmp_path / "kv")
    kind = with_kv_caches(faiss_class(tmp_path)[0], engine, name="docs")
    store = kind.load_local(str(tmp_path / "faiss"), HashingEmbeddings(), allow_dangerous_deserialization=True)
    report = engine.prefill(f"{A}\n\nWhy?").report
    assert [chunk.status for chunk in report.chunks] == ["hit"]
    store.delete(ids[:1])
    check(store, B)
    assert (tmp_path / "kv" / "records.sqlite").stat().st_mode & 0o077 == 0
    engine.store.close()


def test_another_model_caches_anew_and_drops_the_old(tmp_path: Path) -> None:
    plain = InMemoryVectorStore(HashingEmbeddings())
    engine = disk_engine(tmp_path)
    store = with_kv_caches(plain, engine, name="docs")
    store.add_texts([A, B])
    engine.store.close()
    engine = disk_engine(tmp_path, seed=7)
    store = with_kv_caches(plain, engine, name="docs")
    store.cache_existing()
    check(store, A, B)
    engine.store.close()


# ---- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [in_memory, faiss, qdrant])
def test_split_documents_stand_behind_their_own_chunks_only(kind: Any, tmp_path: Path) -> None:
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(encoding="previous:2"))
    documents = [Document(text_of(60, seed=seed), metadata={"source": f"{seed}.txt"}) for seed in (1, 2)]
    splitter = RecursiveCharacterTextSplitter(chunk_size=120, chunk_overlap=0, add_start_index=True)
    chunks = splitter.split_documents(documents)
    store = with_kv_caches(kind(tmp_path, HashingEmbeddings()), engine)
    store.add_documents(chunks[::-1])
    for source in ("1.txt", "2.txt"):
        keys = [chunk_key(engine, one.page_content) for one in chunks if one.metadata["source"] == source]
        assert len(keys) >= 3
        for number, key in enumerate(keys):
            assert engine.store.behind(key).keys == tuple(keys[max(0, number - 2) : number])
    engine.store.delete(engine.store.references(link_of(store).owner))
    store.cache_existing()
    assert [len(engine.store.behind(chunk_key(engine, one.page_content)).keys) for one in chunks[:3]] == [0, 1, 2]


# ---- vector stores that are tested where they are installed ---------------------------------------------------------


def test_lancedb_that_overwrites_its_table(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    """Its default: each write takes the place of all before."""
    pytest.importorskip("lancedb")
    from langchain_community.vectorstores import LanceDB

    store = with_kv_caches(LanceDB(uri=str(tmp_path), embedding=HashingEmbeddings()), fresh_engine)
    store.add_texts([A, B])
    store.add_texts([C])
    assert [one.page_content for one in store.similarity_search("the", k=9)] == [C]
    check(store, C)


def test_milvus_upserts(fresh_engine: ProphetKVEngine, tmp_path: Path) -> None:
    store = with_kv_caches(milvus(tmp_path, HashingEmbeddings()), fresh_engine)
    store.add_documents([Document(A), Document(B)], ids=["a", "b"])
    store.upsert(ids=["a"], documents=[Document(C)])
    check(store, B, C)
    store.delete(expr="pk == 'b'")
    check(store, C)
    store.drop()
    check(store)
