"""The collection proxy on real Chroma: every trap of its API, with each kind of client."""

from __future__ import annotations

import copy
import logging
import uuid
from typing import Any

import numpy as np
import pytest

from prophetkv_rag.chroma import KVCachingCollection
from prophetkv_rag.chroma.records import PROPHETKV_ID
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from tests.chroma.clients import TOO_LONG, A, B, C, D, add, assert_caches_are, embed, key_of


def told(collection: KVCachingCollection, count: int) -> Any:
    """What a delete of so many records says by the installed Chroma: earlier releases than 1.5 say nothing."""
    plain = collection.collection
    plain.add(["told"], [[0.0, 0.0, 0.0]])
    return {"deleted": count} if plain.delete(["told"]) == {"deleted": 1} else None


def test_writes_add_the_key_and_every_read_strips_it(collection: KVCachingCollection) -> None:
    metadatas = [None, {"page": 2}, {"page": 3, PROPHETKV_ID: "forged"}]
    before = copy.deepcopy(metadatas)
    collection.add(["a", "b", "c"], embed(A, B, C), metadatas, [A, f"  {B}\n", C])  # in Chroma's order of arguments
    assert metadatas == before
    assert_caches_are(collection, a=A, b=B, c=C)
    expected = [None, {"page": 2}, {"page": 3}]
    assert collection.get()["metadatas"] == expected
    assert collection.peek(3)["metadatas"] == expected
    assert collection.get(include=["documents"])["metadatas"] is None
    assert collection.get()["documents"] == [A, f"  {B}\n", C]
    found = collection.query(query_embeddings=embed(A, C), n_results=3)
    for ids, metadata in zip(found["ids"], found["metadatas"], strict=True):
        assert metadata == [expected["abc".index(name)] for name in ids]
    assert collection.query(query_embeddings=embed(A), n_results=1, include=["documents"])["metadatas"] is None
    assert collection.get(where={"page": {"$gte": 3}})["ids"] == ["c"]
    assert collection.get(where={PROPHETKV_ID: key_of(collection.engine, A)})["ids"] == ["a"]


def test_one_record_may_be_given_without_lists(collection: KVCachingCollection) -> None:
    collection.add("a", [1.0, 2.0, 3.0], {"page": 1}, A)
    assert_caches_are(collection, a=A)
    assert collection.get("a", include=["embeddings"])["embeddings"].tolist() == [[1.0, 2.0, 3.0]]
    collection.upsert("a", [1.0, 2.0, 3.0], {"more": 2}, B)
    collection.update("a", metadatas={"page": 3})
    assert_caches_are(collection, a=B)
    assert collection.get("a")["metadatas"] == [{"page": 3, "more": 2}]
    collection.delete("a")
    assert_caches_are(collection)


def test_records_without_a_text_have_no_cache(collection: KVCachingCollection) -> None:
    collection.add(["a", "b"], embed(None, None))
    collection.add(["c", "d"], embed(None, D), [{"page": 1}, {"page": 2}], [None, D])  # type: ignore[list-item]
    assert_caches_are(collection, a=None, b=None, c=None, d=D)
    assert collection.get()["metadatas"] == [None, None, {"page": 1}, {"page": 2}]


def test_add_of_an_existing_id_changes_nothing(collection: KVCachingCollection) -> None:
    add(collection, a=A)
    collection.add(["a", "b"], embed(C, B), [{"page": 1}, {"page": 2}], [C, B])
    assert collection.get()["documents"] == [A, B]
    assert collection.get()["metadatas"] == [None, {"page": 2}]
    assert_caches_are(collection, a=A, b=B)


def test_indexing_again_restores_lost_caches(collection: KVCachingCollection) -> None:
    add(collection, a=A, b=B)
    collection.engine.store.delete([key_of(collection.engine, A)])
    add(collection, a=A, b=B)
    assert_caches_are(collection, a=A, b=B)


def test_upsert_renews_the_key_and_merges_the_rest(collection: KVCachingCollection) -> None:
    collection.add(["a", "b"], embed(A, B), [{"page": 1}, {"page": 2}], [A, B])
    collection.upsert(["a", "c"], embed(C, D), [{"new": 5}, None], [C, D])
    assert collection.get("a")["metadatas"] == [{"page": 1, "new": 5}]
    assert_caches_are(collection, a=C, b=B, c=D)
    collection.upsert(["a"], embed(C), [{"page": 7}])  # no text: it stays, and so does its cache
    assert collection.get("a")["documents"] == [C]
    assert_caches_are(collection, a=C, b=B, c=D)


def test_update_of_text_or_metadata_alone(collection: KVCachingCollection) -> None:
    collection.add(["a", "b"], embed(A, B), [{"page": 1}, {"page": 2}], [A, B])
    collection.update(["a"], embed(C), documents=[C])
    assert collection.get("a")["metadatas"] == [{"page": 1}]
    assert_caches_are(collection, a=C, b=B)
    collection.update(["a", "b"], metadatas=[{"page": 8}, {PROPHETKV_ID: "forged"}])
    assert collection.get()["metadatas"] == [{"page": 8}, {"page": 2}]
    assert_caches_are(collection, a=C, b=B)
    collection.update(["a", "b"], embed(C, D), documents=[None, D])  # type: ignore[list-item]
    assert_caches_are(collection, a=C, b=D)


def test_update_of_an_unknown_id_caches_nothing(collection: KVCachingCollection) -> None:
    add(collection, a=A)
    collection.update(["a", "zz"], embed(B, C), documents=[B, C])
    assert_caches_are(collection, a=B)


@pytest.mark.parametrize(
    "how",
    [
        {"ids": ["b", "c"]},
        {"ids": ["b", "b", "c"]},
        {"where": {"page": {"$gte": 2}}},
        {"where_document": {"$not_contains": A}},
        {"ids": [], "where": {"page": {"$gte": 2}}},  # what LlamaIndex's delete_nodes(filters=...) asks
        {"ids": ["a", "b", "c"], "where": {"page": {"$ne": 1}}},
    ],
    ids=str,
)
def test_delete_drops_the_caches_of_what_is_deleted(collection: KVCachingCollection, how: dict[str, Any]) -> None:
    collection.add(["a", "b", "c"], embed(A, B, C), [{"page": 1}, {"page": 2}, {"page": 3}], [A, B, C])
    assert collection.delete(**how) == told(collection, 2)
    assert_caches_are(collection, a=A)
    collection.delete(["unknown"])
    assert_caches_are(collection, a=A)


def test_delete_of_nothing_deletes_nothing(collection: KVCachingCollection) -> None:
    add(collection, a=A)
    assert collection.delete(ids=[]) == {"deleted": 0}
    with pytest.raises(ValueError, match="At least one of ids, where, or where_document"):
        collection.delete()
    with pytest.raises(ValueError, match="Expected where to have exactly one operator"):
        collection.delete(ids=[], where={})
    assert_caches_are(collection, a=A)


def test_a_text_of_two_records_is_cached_until_the_last_one_goes(collection: KVCachingCollection) -> None:
    add(collection, a=A, b=f"{A} ", c=B)
    assert collection.engine.store.stats().chunks == 2
    collection.delete(["a"])
    assert_caches_are(collection, b=A, c=B)
    collection.upsert(["c"], embed(A), documents=[A])
    assert_caches_are(collection, b=A, c=A)
    collection.update(["b"], embed(B), documents=[B])
    assert_caches_are(collection, b=B, c=A)
    collection.delete(["c"])
    assert_caches_are(collection, b=B)


def test_two_collections_share_a_cache_and_dropping_one_leaves_the_other(
    client: Any, collection: KVCachingCollection, caching_engine: ProphetKVEngine
) -> None:
    other = KVCachingCollection(client.create_collection(f"o-{uuid.uuid4()}", embedding_function=None), caching_engine)
    add(collection, a=A, b=B)
    add(other, a=A, c=C)
    collection.delete(["a"])
    assert key_of(caching_engine, A) in caching_engine.store
    client.delete_collection(collection.name)
    assert collection.drop() == [key_of(caching_engine, B)]
    assert_caches_are(other, a=A, c=C)
    client.delete_collection(other.name)
    assert sorted(other.drop()) == sorted([key_of(caching_engine, A), key_of(caching_engine, C)])
    assert caching_engine.store.stats().chunks == 0


def test_a_text_that_cannot_be_a_chunk_does_not_stop_the_others(
    collection: KVCachingCollection, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        add(collection, a=A, e="", w=" \n\t", b=B, t=TOO_LONG, c=C)
    assert_caches_are(collection, a=A, e=None, w=None, b=B, t=None, c=C)
    assert collection.get("t")["documents"] == [TOO_LONG]
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("prophetkv_rag")]
    assert "3 texts" in message
    assert "context window" in message
    collection.upsert(["a"], embed(TOO_LONG), documents=[TOO_LONG])  # the old key must not stay with the new text
    collection.update(["b"], embed(" "), documents=[" "])
    assert_caches_are(collection, a=None, e=None, w=None, b=None, t=None, c=C)
    assert collection.get("a")["metadatas"] == [None]


def test_more_records_than_chroma_takes_at_once(client: Any, collection: KVCachingCollection) -> None:
    count = client.get_max_batch_size() + 500
    ids, texts = [str(i) for i in range(count)], [(A, B)[i >= count - 1] for i in range(count)]
    collection.add(ids, np.array(embed(*texts)), [{"i": i} for i in range(count)], texts)
    assert collection.count() == count
    assert_caches_are(collection, **dict(zip(ids, texts, strict=True)))
    last = collection.get(ids[-1], include=["embeddings", "metadatas", "documents"])
    assert last["metadatas"] == [{"i": count - 1}]
    assert last["documents"] == [B]
    assert last["embeddings"][0][0] == len(B)
    collection.upsert(ids, embed(*texts), documents=[(C, D)[text == B] for text in texts])
    assert_caches_are(collection, **{name: (C, D)[text == B] for name, text in zip(ids, texts, strict=True)})
    collection.update(ids, metadatas=[{"j": 1}] * count)
    assert collection.delete(ids=ids[1:]) == told(collection, count - 1)
    assert_caches_are(collection, **{"0": C})
    many = [str(i) for i in range(33_000)]  # deleted at once by Chroma, but more than it can read at once
    assert collection.delete(ids=many) == told(collection, 33_000)
    assert_caches_are(collection)


def test_a_write_that_fails_half_way_leaves_the_caches_of_what_stands_there(
    collection: KVCachingCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(collection, a=A, b=B)
    plain, upsert = collection.collection, collection.collection.upsert

    def failing(*args: Any, **kwargs: Any) -> None:
        if kwargs["ids"] != ["a"]:
            msg = "connection lost"
            raise ConnectionError(msg)
        upsert(*args, **kwargs)

    monkeypatch.setattr(type(plain), "upsert", lambda self, *args, **kwargs: failing(*args, **kwargs))
    monkeypatch.setattr(collection._caches, "max_batch_size", lambda: 1)
    with pytest.raises(ConnectionError):
        collection.upsert(["a", "b"], embed(C, D), documents=[C, D])
    monkeypatch.undo()
    assert collection.get()["documents"] == [C, B]
    assert_caches_are(collection, a=C, b=B)


@pytest.mark.parametrize(
    "wrong",
    [
        {"embeddings": [[1.0], [2.0]]},  # another dimension
        {"metadatas": [{"nested": {"a": 1}}, None]},
        {"ids": ["c", "c"]},
        {"documents": [C]},
        {"documents": [C, 5]},
        {"ids": []},
        {"metadatas": ["text", "text"]},
    ],
    ids=str,
)
def test_what_chroma_refuses_leaves_no_cache_behind(collection: KVCachingCollection, wrong: dict[str, Any]) -> None:
    add(collection, a=A, b=B)
    arguments = {"ids": ["a", "c"], "embeddings": embed(C, D), "documents": [C, D]} | wrong
    for method in ("add", "upsert", "update"):
        errors = []
        for target in (collection.collection, collection):  # with the very error that plain Chroma raises
            with pytest.raises(Exception) as caught:
                getattr(target, method)(**arguments)
            errors.append((type(caught.value), str(caught.value)))
        assert errors[0] == errors[1]
        assert_caches_are(collection, a=A, b=B)


HALF = "A text with half a character \ud835 from a damaged PDF."
WHOLE = HALF.replace("\ud835", "\ufffd")


def references(collection: KVCachingCollection) -> set[str]:
    return set(collection.engine.store.references(collection.owner))


def test_half_a_character_is_replaced_and_the_other_records_are_kept(collection: KVCachingCollection) -> None:
    collection.add(["a", "b"], embed(A, WHOLE), [{"file": "x\ud835"}, {"file": "y"}], [A, HALF])
    assert collection.get()["documents"] == [A, WHOLE]
    assert references(collection) == {key_of(collection.engine, A), key_of(collection.engine, WHOLE)}
    assert collection.get(where={"file": "x\ud835"})["ids"] == ["a"]
    assert collection.query(query_embeddings=embed(A), n_results=1, where={"file": "x\ud835"})["ids"] == [["a"]]
    collection.upsert(["a"], embed(WHOLE), documents=[HALF])
    collection.update(["b"], metadatas=[{"file": "\udc00"}])
    assert references(collection) == {key_of(collection.engine, WHOLE)}
    collection.delete(where={"file": "\udc00"})
    assert collection.get()["ids"] == ["a"]


def test_an_id_with_half_a_character_is_refused_by_name(collection: KVCachingCollection) -> None:
    with pytest.raises(InputError, match=r"the id 'x\\ud835' is not valid Unicode"):
        collection.add(["a", "x\ud835"], embed(A, B), documents=[A, B])
    assert_caches_are(collection)
