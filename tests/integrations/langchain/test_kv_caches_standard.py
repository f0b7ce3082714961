"""LangChain's own suite for vector stores passes through `with_kv_caches` where it passes without.

To see what fails without: `PLAIN = True`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.langchain import with_kv_caches
from tests.integrations.langchain.stores import chroma, faiss_class, qdrant_class

pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")


class Wrapped(VectorStoreIntegrationTests):
    """The suite on a wrapper; on the plain vector store with `PLAIN`.

    Attributes:
        fail_anyway: Tests that fail without the wrapper, in the same way, sync and async (run them with `PLAIN`).
        because: Why they do: what the vector store itself does otherwise than the suite asks.
    """

    PLAIN = False
    fail_anyway: tuple[str, ...] = ()
    because = ""

    def make(self, directory: Path) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def vectorstore(self, chat_engine: ProphetKVEngine, tmp_path: Path, request: pytest.FixtureRequest) -> VectorStore:
        if request.function.__name__.removesuffix("_async") in self.fail_anyway:
            reason = f"fails without the wrapper too: {self.because}"
            request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
        plain = self.make(tmp_path)
        return plain if self.PLAIN else with_kv_caches(plain, chat_engine)


class TestInMemory(Wrapped):
    def make(self, directory: Path) -> Any:
        return InMemoryVectorStore(self.get_embeddings())


class TestChroma(Wrapped):
    def make(self, directory: Path) -> Any:
        return chroma(directory, self.get_embeddings())


class TestFAISS(Wrapped):
    because = "FAISS refuses ids that it has, and to delete those that it has not"
    fail_anyway = (
        "test_delete_missing_content",
        "test_add_documents_with_ids_is_idempotent",
        "test_add_documents_by_id_with_mutation",
    )

    def make(self, directory: Path) -> Any:
        class_, _ = faiss_class(directory)
        import faiss
        from langchain_community.docstore.in_memory import InMemoryDocstore

        return class_(self.get_embeddings(), faiss.IndexFlatL2(6), InMemoryDocstore(), {})


class TestQdrant(Wrapped):
    because = "Qdrant takes no ids but UUIDs and numbers, and leaves them out of the documents that it returns"
    fail_anyway = (
        "test_add_documents",
        "test_deleting_documents",
        "test_deleting_bulk_documents",
        "test_add_documents_with_ids_is_idempotent",
        "test_add_documents_by_id_with_mutation",
        "test_get_by_ids",
        "test_add_documents_documents",
        "test_add_documents_with_existing_ids",
    )

    def make(self, directory: Path) -> Any:
        class_, arguments = qdrant_class(directory)
        from qdrant_client import QdrantClient
        from qdrant_client.models import Distance, VectorParams

        client, name = QdrantClient(":memory:"), arguments["collection_name"]
        client.create_collection(name, vectors_config=VectorParams(size=6, distance=Distance.COSINE))
        return class_(client=client, collection_name=name, embedding=self.get_embeddings())
