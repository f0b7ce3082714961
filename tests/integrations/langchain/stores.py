"""LangChain's vector stores as the tests make them: empty, local, without a server, 256 dimensions."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

Make = Callable[[Path, Embeddings], Any]


@dataclass(frozen=True)
class StoreKind:
    """One kind of vector store.

    Attributes:
        name: As in the table of docs/vector_stores.md.
        make: Makes an empty one in a directory.
        class_: Its class, and more arguments of `from_texts`.
        filter_for: Makes of a number the filter for metadata `{"n": number}`; `None` where there are no filters.
    """

    name: str
    make: Make
    class_: Callable[[Path], tuple[type, dict[str, Any]]]
    filter_for: Callable[[int], Any] | None = lambda n: {"n": n}


def new_name() -> str:
    return f"t{uuid.uuid4().hex}"


def in_memory(directory: Path, embeddings: Embeddings) -> Any:
    from langchain_core.vectorstores import InMemoryVectorStore

    return InMemoryVectorStore(embeddings)


def in_memory_class(directory: Path) -> tuple[type, dict[str, Any]]:
    from langchain_core.vectorstores import InMemoryVectorStore

    return InMemoryVectorStore, {}


def chroma(directory: Path, embeddings: Embeddings) -> Any:
    class_, arguments = chroma_class(directory)
    return class_(embedding_function=embeddings, **arguments)


def chroma_class(directory: Path) -> tuple[type, dict[str, Any]]:
    import chromadb
    from langchain_chroma import Chroma

    return Chroma, {"client": chromadb.EphemeralClient(), "collection_name": new_name()}


def faiss(directory: Path, embeddings: Embeddings) -> Any:
    import faiss
    from langchain_community.docstore.in_memory import InMemoryDocstore

    class_, _ = faiss_class(directory)
    return class_(embeddings, faiss.IndexFlatL2(256), InMemoryDocstore(), {})


def faiss_class(directory: Path) -> tuple[type, dict[str, Any]]:
    pytest.importorskip("faiss")
    from langchain_community.vectorstores import FAISS

    return FAISS, {}


def qdrant(directory: Path, embeddings: Embeddings) -> Any:
    class_, _ = qdrant_class(directory)
    from qdrant_client import QdrantClient
    from qdrant_client.models import Distance, VectorParams

    client, name = QdrantClient(":memory:"), new_name()
    client.create_collection(name, vectors_config=VectorParams(size=256, distance=Distance.COSINE))
    return class_(client=client, collection_name=name, embedding=embeddings)


def qdrant_class(directory: Path) -> tuple[type, dict[str, Any]]:
    qdrant = pytest.importorskip("langchain_qdrant")
    return qdrant.QdrantVectorStore, {"location": ":memory:", "collection_name": new_name()}


def qdrant_filter(number: int) -> Any:
    from qdrant_client.models import FieldCondition, Filter, MatchValue

    return Filter(must=[FieldCondition(key="metadata.n", match=MatchValue(value=number))])


def lancedb(directory: Path, embeddings: Embeddings) -> Any:
    class_, arguments = lancedb_class(directory)
    arguments.pop("connection")
    return class_(uri=str(directory / "lance"), embedding=embeddings, **arguments)


def lancedb_class(directory: Path) -> tuple[type, dict[str, Any]]:
    lancedb = pytest.importorskip("lancedb")
    from langchain_community.vectorstores import LanceDB

    connection = lancedb.connect(str(directory / "lance"))
    return LanceDB, {"connection": connection, "table_name": new_name(), "mode": "append"}


def milvus(directory: Path, embeddings: Embeddings) -> Any:
    class_, arguments = milvus_class(directory)
    return class_(embeddings, **arguments)


def milvus_class(directory: Path) -> tuple[type, dict[str, Any]]:
    pytest.importorskip("milvus_lite")
    milvus = pytest.importorskip("langchain_milvus")
    arguments = {
        "connection_args": {"uri": str(directory / "milvus.db")},
        "collection_name": new_name(),
        "index_params": {"index_type": "FLAT", "metric_type": "L2"},
        "consistency_level": "Strong",
    }
    return milvus.Milvus, arguments


def duckdb(directory: Path, embeddings: Embeddings) -> Any:
    class_, _ = duckdb_class(directory)
    import duckdb

    return class_(connection=duckdb.connect(":memory:"), embedding=embeddings, table_name=new_name())


def duckdb_class(directory: Path) -> tuple[type, dict[str, Any]]:
    pytest.importorskip("duckdb")
    from langchain_community.vectorstores import DuckDB

    return DuckDB, {}


def by_function(number: int) -> Callable[[Document], bool]:
    return lambda document: document.metadata.get("n") == number


KINDS = (
    StoreKind("`InMemoryVectorStore`", in_memory, in_memory_class, by_function),
    StoreKind("`langchain_chroma.Chroma`", chroma, chroma_class),
    StoreKind("`langchain_community` `FAISS`", faiss, faiss_class),
    StoreKind("`langchain_qdrant.QdrantVectorStore`", qdrant, qdrant_class, qdrant_filter),
    StoreKind("`langchain_community` `LanceDB`", lancedb, lancedb_class, lambda n: f"metadata.n = {n}"),
    StoreKind("`langchain_milvus.Milvus` (Milvus Lite)", milvus, milvus_class, None),
    StoreKind("`langchain_community` `DuckDB`", duckdb, duckdb_class, None),
)
