"""A collection that was opened before a fork: Chroma's own client hangs in the child, so the child is told."""

from __future__ import annotations

import copy
import os

import pytest

from prophetkv_rag.chroma import KVCachingCollection
from prophetkv_rag.errors import StoreError
from tests.forked import forked
from tests.tiny import text_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no os.fork")


def test_the_child_is_told_and_the_parent_goes_on(collection: KVCachingCollection) -> None:
    vector = [1.0, 0.0]
    collection.add(ids=["a"], documents=[text_of(30)], embeddings=[vector])

    def refusals() -> list[str]:
        said = []
        for call in (
            lambda: collection.count(),
            lambda: collection.get(ids=["a"]),
            lambda: collection.query(query_embeddings=[vector], n_results=1),
            lambda: collection.add(ids=["b"], documents=[text_of(31)], embeddings=[vector]),
            lambda: collection.delete(ids=["a"]),
            lambda: copy.copy(collection).peek(),
        ):
            try:
                call()
            except StoreError as error:
                said.append(str(error))
        return said

    said = forked(refusals)
    assert len(said) == 6
    assert all("after the fork, in each process" in message for message in said)
    assert collection.count() == 1
    assert collection.query(query_embeddings=[vector], n_results=1)["ids"] == [["a"]]
